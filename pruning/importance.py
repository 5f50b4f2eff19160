"""Block Influence, the importance of a decoder layer.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, equation 1: the influence of layer i is ::

    BI_i = 1 - E_t[cos(h_i[t], h_{i+1}[t])]

where h_i[t] is the residual stream of token t as layer i receives it and h_{i+1}[t] as it leaves
it, before any norm. A layer that barely turns the residual stream scores near 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, find_decoder, observed

if TYPE_CHECKING:
    import torch
    from torch import nn


class ImportanceError(ValueError):
    """Measurements of a layer that cannot be used to rank it."""


@dataclass(frozen=True, slots=True)
class BlockInfluence:
    """The influence of each layer, with its standard error, over ``num_tokens`` tokens.

    The standard errors treat tokens as independent. Tokens of one text are not quite independent,
    so the standard errors are lower bounds.
    """

    scores: tuple[float, ...]
    stderrs: tuple[float, ...]
    num_tokens: int


class BlockInfluenceEstimator:
    """Sums of the influence of every layer over any number of tokens, in constant memory."""

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, allowed: at least 1")
        self._num_tokens = [0] * num_layers
        # For each layer, the sum and the sum of squares, float64 [2], on the device of its states.
        self._moments: list[torch.Tensor | None] = [None] * num_layers

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the tokens of one forward pass of ``layer``.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only. Cosines are computed in float32, or in float64 if
        the states are float64, and summed in float64. The call does not wait for the device.
        """
        import torch

        if not 0 <= layer < len(self._num_tokens):
            raise ValueError(f"layer: got {layer}, allowed: 0 to {len(self._num_tokens) - 1}")
        if before.ndim != 2 or before.shape != after.shape:
            raise ValueError(
                f"before, after: got shapes {list(before.shape)} and {list(after.shape)}, "
                "allowed: equal shapes [num_tokens, hidden]"
            )
        with torch.no_grad():
            influence = 1 - torch.linalg.vecdot(_directions(before), _directions(after)).double()
            moments = torch.stack([influence.sum(), influence.square().sum()])
            previous = self._moments[layer]
            # Not in place: a tensor made under inference_mode could not be changed outside it.
            self._moments[layer] = moments if previous is None else previous + moments
        self._num_tokens[layer] += before.shape[0]

    def sums(self) -> list[list[float]]:
        """Return for each layer the number of tokens, and the sums of influences and of squares.

        These are plain lists, which can be sent between processes. :func:`merge_sums` adds them,
        and :func:`block_influence` turns them into scores. The call waits for the device.
        """
        return [
            [float(n), *(moments.tolist() if moments is not None else (0.0, 0.0))]
            for n, moments in zip(self._num_tokens, self._moments, strict=True)
        ]


def merge_sums(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the sums over the tokens of both ``a`` and ``b``, which must be different tokens."""
    if len(a) != len(b):
        raise ValueError(f"sums: got {len(a)} and {len(b)} layers, allowed: equally many")
    return [
        [x + y for x, y in zip(of_a, of_b, strict=True)] for of_a, of_b in zip(a, b, strict=True)
    ]


def block_influence(sums: Sequence[Sequence[float]]) -> BlockInfluence:
    """Turn the sums of :class:`BlockInfluenceEstimator` into scores and standard errors.

    Raises :class:`ImportanceError`, naming the layer, if a sum is not finite (because a state was
    NaN, infinite or a zero vector, which has no direction), if fewer than two tokens were
    measured, and if the layers saw different numbers of tokens.
    """
    if not sums:
        raise ImportanceError("no layers were measured")
    scores, stderrs = [], []
    for layer, (n, total, squares) in enumerate(sums):
        if n < 2:
            raise ImportanceError(f"layer {layer}: measured on {n:.0f} tokens, allowed: 2 or more")
        if not (math.isfinite(total) and math.isfinite(squares)):
            raise ImportanceError(
                f"layer {layer}: the block influence is not finite: among the states of "
                f"{n:.0f} tokens is a NaN, an infinity or a zero vector"
            )
        if n != sums[0][0]:
            raise ImportanceError(
                f"layer {layer}: measured on {n:.0f} tokens, but layer 0 on {sums[0][0]:.0f}"
            )
        mean = total / n
        # Rounding may make the variance of equal influences slightly negative.
        variance = max(squares - total * mean, 0.0) / (n - 1)
        scores.append(mean)
        stderrs.append(math.sqrt(variance / n))
    return BlockInfluence(tuple(scores), tuple(stderrs), int(sums[0][0]))


def measure_block_influence(
    model: nn.Module,
    input_ids_batches: Iterable[torch.Tensor],
    attention_masks: Iterable[torch.Tensor] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> BlockInfluence:
    """Measure the influence of the decoder layers of a transformers model.

    ``input_ids_batches`` are [batch, length]; ``attention_masks``, one for each batch and of
    its shape, are zero at padding, which is not counted. Batches for a model that ignores masks,
    such as RWKV, must be padded on the right. By default, ``layers`` are those that
    :func:`pruning.decoder.find_decoder` finds. The states are taken from the layers themselves
    and not from ``output_hidden_states``, whose last entry has gone through the final norm.

    Raises :class:`ValueError` for a model in training mode, where dropout would distort the
    states, and for one whose layers cannot be found; :class:`ImportanceError` as
    :func:`block_influence` does.
    """
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    estimator = BlockInfluenceEstimator(len(decoder.layers))

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        estimator.update(layer, passes.valid_tokens(before), passes.valid_tokens(after))

    with observed(decoder.layers, observe):
        passes.run(input_ids_batches, attention_masks)
    return block_influence(estimator.sums())


def _directions(states: torch.Tensor) -> torch.Tensor:
    import torch

    # A zero vector has no direction. With torch's cosine_similarity its cosine would be 0; here it
    # becomes NaN, which block_influence refuses.
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    norms: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / norms
