"""What one forward pass at full depth shows of every layer, for the metrics that rank by it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, find_decoder, observed
from pruning.importance import BlockInfluence, block_influence
from pruning.layer_means import (
    ImportanceError,
    LayerMeanEstimator,
    LayerMeans,
    layer_means,
    merge_sums,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class DensePass:
    """What was measured at full depth.

    ``angular_distances`` is [num_layers + 1, num_layers + 1]: entry (l, m) is the distance, 0 to
    1, between the streams that layers l and m receive, averaged over the last tokens of
    ``num_texts`` texts; what the last layer leaves counts as what one more would receive. None
    where no process had all layers.
    """

    block_influence: BlockInfluence
    relative_magnitude: LayerMeans
    norm: LayerMeans
    angular_distances: tuple[tuple[float, ...], ...] | None
    num_texts: int


@dataclass(frozen=True, slots=True)
class DensePassSums:
    """What the tokens of some texts add up to, as plain numbers to be sent between processes.

    ``moments`` is [num_layers, 7]: the number of tokens, then sum and sum of squares of block
    influence, relative magnitude and norm; zeros for the layers of other processes. ``angles`` is
    [num_layers + 1, num_layers + 1], the sums of the angular distances over ``num_texts`` last
    tokens; None where they were not measured.
    """

    moments: Sequence[Sequence[float]]
    angles: Sequence[Sequence[float]] | None
    num_texts: int

    def __add__(self, other: DensePassSums) -> DensePassSums:
        """Return the sums of distinct tokens, or of distinct layers for the same tokens."""
        angles = self.angles or other.angles
        if self.angles is not None and other.angles is not None:
            angles = merge_sums(self.angles, other.angles)
        return DensePassSums(
            merge_sums(self.moments, other.moments), angles, self.num_texts + other.num_texts
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens were measured, at layer 0."""
        return int(self.moments[0][0])


class DensePassEstimator:
    """Accumulates :class:`DensePassSums` over any number of tokens in constant memory.

    That is 7 numbers for each layer, and one for each pair of layers. While a forward pass runs,
    there are also the streams of the texts that end in it, [num_layers + 1, num_texts, hidden].
    """

    def __init__(self, num_layers: int) -> None:
        self._means = _MomentsEstimator(num_layers)
        self._angles = _AngleEstimator(num_layers)

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, last_tokens: torch.Tensor
    ) -> None:
        """Add the tokens of one forward pass of ``layer``, the layers in their order.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only; ``last_tokens``, int64 [num_texts], are the
        indices of those that are the last of their text.
        """
        self._means.update(layer, before, after)
        self._angles.update(layer, before[last_tokens], after[last_tokens])

    def sums(self) -> DensePassSums:
        """Return what was added so far; waits for the device."""
        return DensePassSums(self._means.sums(), *self._angles.sums())

    def result(self) -> DensePass:
        """Return what was measured.

        Raises :class:`pruning.layer_means.ImportanceError` as :func:`dense_pass` does, and where
        there was no last token of a text.
        """
        found = dense_pass([self.sums()])
        if not found.num_texts:
            raise ImportanceError("no last token of a text was measured")
        return found


def dense_pass(sums: Sequence[DensePassSums]) -> DensePass:
    """Return what the sums of one or more groups of texts say together.

    Raises :class:`pruning.layer_means.ImportanceError` for states that are not finite and
    where there were fewer than two tokens.
    """
    total = sums[0]
    for other in sums[1:]:
        total += other
    influence, magnitude, norm = (
        [(n, *of_layer[first : first + 2]) for n, *of_layer in total.moments] for first in (0, 2, 4)
    )
    # Block influence refuses what is damaged, with the layer, so it comes first.
    return DensePass(
        block_influence(influence),
        layer_means(magnitude, "relative magnitude"),
        layer_means(norm, "norm"),
        None if total.angles is None else _mean_distances(total.angles, total.num_texts),
        total.num_texts,
    )


def measure_dense_pass(
    model: nn.Module,
    input_ids_batches: Iterable[torch.Tensor],
    attention_masks: Iterable[torch.Tensor] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> DensePass:
    """Measure a transformers model at full depth.

    The arguments are those of :func:`pruning.importance.measure_block_influence`, as is what is
    raised. Each row of a batch is one text.
    """
    return _estimated(model, input_ids_batches, attention_masks, layers).result()


def measure_dense_pass_sums(
    model: nn.Module, input_ids_batches: Iterable[torch.Tensor]
) -> DensePassSums:
    """Return what :func:`measure_dense_pass` adds up, to be added to the sums of other texts."""
    return _estimated(model, input_ids_batches).sums()


def _estimated(
    model: nn.Module,
    input_ids_batches: Iterable[torch.Tensor],
    attention_masks: Iterable[torch.Tensor] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> DensePassEstimator:
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    estimator = DensePassEstimator(len(decoder.layers))

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        x, y = passes.valid_tokens(before), passes.valid_tokens(after)
        estimator.update(layer, x, y, passes.last_tokens())

    with observed(decoder.layers, observe):
        passes.run(input_ids_batches, attention_masks)
    return estimator


class _MomentsEstimator(LayerMeanEstimator):
    """The three quantities of a token, which share what is costly of them."""

    num_quantities = 3

    def of_tokens(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        import torch

        was, left = (torch.linalg.vector_norm(each, dim=-1) for each in (before, after))
        # A zero vector has no direction: it gives a NaN, which is refused.
        cosines = torch.linalg.vecdot(before / was[:, None], after / left[:, None])
        added = torch.linalg.vector_norm(after - before, dim=-1)
        return torch.stack([1 - cosines.double(), (added / left).double(), left.double()])


class _AngleEstimator:
    """Sums the angles between the streams at all pairs of layers."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._streams: list[torch.Tensor] = []
        self._sums: torch.Tensor | None = None
        self._num_texts = 0

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        import torch

        if layer == 0:
            self._streams = []
        if len(self._streams) != layer or not len(before):
            return  # another process has the layers before, or no text ends here
        with torch.no_grad():
            self._streams.append(before.double())
            if layer + 1 < self._num_layers:
                return
            streams = torch.stack([*self._streams, after.double()], dim=1)
            directions = streams / torch.linalg.vector_norm(streams, dim=-1, keepdim=True)
            cosines = (directions @ directions.mT).clamp(-1, 1)
            distances = (cosines.arccos() / math.pi).sum(0)
            self._sums = distances if self._sums is None else self._sums + distances
        self._num_texts += len(streams)
        self._streams = []

    def sums(self) -> tuple[list[list[float]] | None, int]:
        return None if self._sums is None else self._sums.tolist(), self._num_texts


def _mean_distances(
    sums: Sequence[Sequence[float]], num_texts: int
) -> tuple[tuple[float, ...], ...]:
    means = tuple(tuple(value / num_texts for value in row) for row in sums)
    if not all(map(math.isfinite, itertools.chain.from_iterable(means))):
        raise ImportanceError(
            "the angular distance is not finite: among the states is a NaN, an infinity or "
            "a zero vector"
        )
    # A stream is at no distance from itself, whatever rounding says.
    return tuple(
        tuple(0.0 if i == j else value for j, value in enumerate(row))
        for i, row in enumerate(means)
    )
