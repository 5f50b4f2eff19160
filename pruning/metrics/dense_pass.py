"""What one forward pass at full depth shows of every layer, for the metrics that rank by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, find_decoder, observed
from pruning.importance import BlockInfluence, BlockInfluenceEstimator, block_influence
from pruning.layer_means import ImportanceError, LayerMeanEstimator, LayerMeans, layer_means

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class DensePass:
    """What was measured at full depth.

    ``angular_distances`` is [num_layers + 1, num_layers + 1]: entry (l, m) is the distance, 0 to
    1, between the streams that layers l and m receive, averaged over the last tokens of
    ``num_texts`` texts; what the last layer leaves counts as what one more would receive.
    """

    block_influence: BlockInfluence
    relative_magnitude: LayerMeans
    norm: LayerMeans
    angular_distances: tuple[tuple[float, ...], ...]
    num_texts: int


class DensePassEstimator:
    """Accumulates a :class:`DensePass` over any number of tokens in constant memory."""

    def __init__(self, num_layers: int) -> None:
        self._block_influence = BlockInfluenceEstimator(num_layers)
        self._relative_magnitude = _RelativeMagnitudeEstimator(num_layers)
        self._norm = _NormEstimator(num_layers)
        self._angles = _AngleEstimator(num_layers)

    def update(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, last_tokens: torch.Tensor
    ) -> None:
        """Add the tokens of one forward pass of ``layer``, the layers in their order.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only; ``last_tokens``, int64 [num_texts], are the
        indices of those that are the last of their text.
        """
        for estimator in (self._block_influence, self._relative_magnitude, self._norm):
            estimator.update(layer, before, after)
        self._angles.update(layer, before[last_tokens], after[last_tokens])

    def result(self) -> DensePass:
        """Return what was measured.

        Raises :class:`pruning.layer_means.ImportanceError` for states that are not finite and
        where there were fewer than two tokens, or no last token of a text.
        """
        # Block influence refuses what is damaged, with the layer, so it comes first.
        influence = block_influence(self._block_influence.sums())
        return DensePass(
            influence,
            layer_means(self._relative_magnitude.sums(), "relative magnitude"),
            layer_means(self._norm.sums(), "norm"),
            *self._angles.result(),
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
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    estimator = DensePassEstimator(len(decoder.layers))

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        x, y = passes.valid_tokens(before), passes.valid_tokens(after)
        estimator.update(layer, x, y, passes.last_tokens())

    with observed(decoder.layers, observe):
        passes.run(input_ids_batches, attention_masks)
    return estimator.result()


class _RelativeMagnitudeEstimator(LayerMeanEstimator):
    def of_tokens(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        import torch

        added = torch.linalg.vector_norm(after - before, dim=-1)
        left = torch.linalg.vector_norm(after, dim=-1)
        magnitudes: torch.Tensor = added / left
        return magnitudes


class _NormEstimator(LayerMeanEstimator):
    def of_tokens(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        import torch

        norms: torch.Tensor = torch.linalg.vector_norm(after, dim=-1)
        return norms


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

    def result(self) -> tuple[tuple[tuple[float, ...], ...], int]:
        if self._sums is None or self._num_texts == 0:
            raise ImportanceError("no last token of a text was measured")
        mean = self._sums / self._num_texts
        if not bool(mean.isfinite().all()):
            raise ImportanceError(
                "the angular distance is not finite: among the states is a NaN, an infinity or "
                "a zero vector"
            )
        # A stream is at no distance from itself, whatever rounding says.
        return tuple(map(tuple, mean.fill_diagonal_(0).tolist())), self._num_texts
