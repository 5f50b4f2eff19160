"""Block Influence, the importance of a decoder layer.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, equation 1: the influence of layer i is ::

    BI_i = 1 - E_t[cos(h_i[t], h_{i+1}[t])]

where h_i[t] is the residual stream of token t as layer i receives it and h_{i+1}[t] as it leaves
it, before any norm. A layer that barely turns the residual stream scores near 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class ImportanceError(ValueError):
    """What was measured of a layer is not fit to rank it."""


@dataclass(frozen=True, slots=True)
class BlockInfluence:
    """The influence of each layer, with its standard error, over ``num_tokens`` tokens.

    The standard errors treat the tokens as independent. Tokens of one text are not quite, so
    read them as lower bounds.
    """

    scores: tuple[float, ...]
    stderrs: tuple[float, ...]
    num_tokens: int


class BlockInfluenceEstimator:
    """Accumulates the influence of every layer over any number of tokens in constant memory."""

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, allowed: at least 1")
        self._num_tokens = [0] * num_layers
        # Of each layer, on the device of its states: sum and sum of squares, float64 [2].
        self._moments: list[torch.Tensor | None] = [None] * num_layers

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the tokens of one forward pass of ``layer``.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only. Cosines are computed in float32, in float64
        where the states are float64, and summed in float64. Nothing waits for the device.
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
        """Return, for each layer, the number of tokens and the sum of influences and squares.

        Plain lists, to be sent between processes, merged with :func:`merge_sums` and turned
        into scores with :func:`block_influence`. Waits for the device.
        """
        return [
            [float(n), *(moments.tolist() if moments is not None else (0.0, 0.0))]
            for n, moments in zip(self._num_tokens, self._moments, strict=True)
        ]


def merge_sums(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the sums over the tokens of ``a`` and ``b`` together; they must be distinct tokens."""
    if len(a) != len(b):
        raise ValueError(f"sums: got {len(a)} and {len(b)} layers, allowed: equally many")
    return [
        [x + y for x, y in zip(of_a, of_b, strict=True)] for of_a, of_b in zip(a, b, strict=True)
    ]


def block_influence(sums: Sequence[Sequence[float]]) -> BlockInfluence:
    """Turn the sums of :class:`BlockInfluenceEstimator` into scores and standard errors.

    Raises :class:`ImportanceError`, naming the layer, where a sum is not finite (a state was
    NaN, infinite or a zero vector, which has no direction), where fewer than two tokens were
    measured, and where the layers saw different numbers of tokens.
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
        # Rounding may leave the variance of equal influences just below zero.
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
    its shape, are zero at padding, which is not counted. ``layers`` defaults to the layers of
    ``model.get_decoder()``. The states are taken from the layers themselves and not from
    ``output_hidden_states``, whose last entry has gone through the final norm.

    Raises :class:`ValueError` for a model in training mode, where dropout would falsify the
    states, and for one whose layers cannot be found; :class:`ImportanceError` as
    :func:`block_influence` does.
    """
    import torch

    if model.training:
        raise ValueError("model: got a model in training mode, allowed: after model.eval()")
    decoder = _decoder(model)
    if layers is None:
        layers = _decoder_layers(decoder)
    estimator = BlockInfluenceEstimator(len(layers))
    valid: torch.Tensor | None = None

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if valid is not None:
            before, after = before[valid], after[valid]
        estimator.update(layer, before.flatten(0, -2), after.flatten(0, -2))

    hooks = [
        module.register_forward_hook(_observer(layer, observe), with_kwargs=True)
        for layer, module in enumerate(layers)
    ]
    try:
        with torch.inference_mode():
            if attention_masks is None:
                for input_ids in input_ids_batches:
                    decoder(input_ids=input_ids, use_cache=False)
            else:
                for input_ids, mask in zip(input_ids_batches, attention_masks, strict=True):
                    if mask.shape != input_ids.shape:
                        raise ValueError(
                            f"attention_masks: got shape {list(mask.shape)}, "
                            f"allowed: {list(input_ids.shape)}, that of the input ids"
                        )
                    valid = mask.bool()
                    decoder(input_ids=input_ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return block_influence(estimator.sums())


def _directions(states: torch.Tensor) -> torch.Tensor:
    import torch

    # torch's own cosine_similarity and normalize turn a zero vector, which has no direction,
    # into a cosine of 0. Here it becomes NaN, which block_influence refuses.
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    norms: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / norms


def _decoder(model: nn.Module) -> nn.Module:
    # Spares the product with the output embeddings, often the widest of the model.
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if decoder is not None else model


def _decoder_layers(decoder: nn.Module) -> Sequence[nn.Module]:
    from torch import nn

    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise ValueError(
            f"model: {type(decoder).__name__} has no module list named 'layers'; "
            "pass its decoder layers as the argument layers"
        )
    return list(layers)


def _observer(
    layer: int, observe: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        observe(layer, before, output[0] if isinstance(output, tuple) else output)

    return hook
