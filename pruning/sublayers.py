"""Block Influence of attention and feed-forward, the two parts of a decoder layer.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, table 1, removes one part of a layer at a time. A sequential pre-norm layer adds
its parts to the residual stream one after the other ::

    y = x + attention(norm(x))
    z = y + feed_forward(norm(y))

so that equation 1, applied to x and y and to y and z, gives the influence of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pruning.decoder import (
    ForwardPasses,
    find_decoder,
    inference_options,
    observed,
    on_stream_into,
)
from pruning.importance import (
    BlockInfluence,
    BlockInfluenceEstimator,
    ImportanceError,
    block_influence,
)
from pruning.quality import Quality, next_token_logits, paired_statistics, quality_of_windows

if TYPE_CHECKING:
    import torch
    from torch import nn

Part = Literal["attention", "feed_forward"]

# The module whose output the layer adds to the stream. OPT has no module for its whole
# feed-forward; fc2 is the last linear layer of it.
_PARTS: dict[Part, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "linear_attn"),
    "feed_forward": ("mlp", "feed_forward", "block_sparse_moe", "fc2"),
}
_ATTENTION_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm")
# Gemma has both of the first two; its post_attention_layernorm runs on the output of attention.
_FEED_FORWARD_NORMS = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "final_layer_norm",
)


@dataclass(frozen=True, slots=True)
class SublayerInfluence:
    """The influence of the attention and of the feed-forward of each layer."""

    attention: BlockInfluence
    feed_forward: BlockInfluence


def measure_sublayer_influence(
    model: nn.Module,
    input_ids_batches: Iterable[torch.Tensor],
    attention_masks: Iterable[torch.Tensor] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> SublayerInfluence:
    """Measure the influence of the parts of the decoder layers of a transformers model.

    Arguments and errors are those of :func:`pruning.importance.measure_block_influence`. Layers
    that are not sequential and pre-norm raise :class:`ValueError` as well. In a parallel layer
    (GPT-NeoX, Phi) both parts run on x and there is no y; in a post-norm layer (OPT-350M) the norm
    belongs to neither part.
    """
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    num_layers = len(decoder.layers)
    attention = BlockInfluenceEstimator(num_layers)
    feed_forward = BlockInfluenceEstimator(num_layers)
    # For the running layer: the stream it received, the address of that tensor, and y.
    received: dict[int, torch.Tensor] = {}
    addresses: dict[int, int] = {}
    between: dict[int, torch.Tensor] = {}

    def on_layer(layer: int, states: torch.Tensor) -> None:
        addresses[layer] = states.data_ptr()

    def on_attention_norm(layer: int, states: torch.Tensor) -> None:
        before = received[layer]
        if not _equal(states, before):
            raise _refusal(decoder.layers, layer, "its first norm does not receive its input")

    def on_feed_forward_norm(layer: int, states: torch.Tensor) -> None:
        before = received[layer]
        # A part that contributes nothing leaves equal values as well, but in another tensor.
        if states.data_ptr() == addresses[layer] and _equal(states, before):
            raise _refusal(decoder.layers, layer, "its feed-forward works on its input (parallel)")
        # OPT flattens the batch.
        between[layer] = states.clone().reshape(before.shape)

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if layer not in between:
            raise _refusal(decoder.layers, layer, "the norm before its feed-forward did not run")
        x, y, z = (passes.valid_tokens(s) for s in (before, between.pop(layer), after))
        attention.update(layer, x, y)
        feed_forward.update(layer, y, z)

    with ExitStack() as hooks:
        for layer, module in enumerate(decoder.layers):
            for part in get_args(Part):
                _part_of(module, layer, part)
            norms = [_child(module, names) for names in (_ATTENTION_NORMS, _FEED_FORWARD_NORMS)]
            if norms[0] is None or norms[1] is None:
                raise _refusal(
                    decoder.layers,
                    layer,
                    f"it lacks a norm before attention (looked for: {', '.join(_ATTENTION_NORMS)}) "
                    f"or between the parts (looked for: {', '.join(_FEED_FORWARD_NORMS)})",
                )
            hooks.enter_context(on_stream_into(module, layer, on_layer))
            hooks.enter_context(on_stream_into(norms[0], layer, on_attention_norm))
            hooks.enter_context(on_stream_into(norms[1], layer, on_feed_forward_norm))
        hooks.enter_context(observed(decoder.layers, observe, received))
        passes.run(input_ids_batches, attention_masks)
    sums = {"attention": attention.sums(), "feed_forward": feed_forward.sums()}
    _refuse_damage(sums)
    return SublayerInfluence(*(block_influence(of_part) for of_part in sums.values()))


@contextmanager
def without_part(model: nn.Module, layer: int, part: Part) -> Iterator[None]:
    """Make the attention or the feed-forward of one layer contribute nothing, while in context.

    The part still runs, so that attention fills its cache and generation works; its output is
    replaced by zeros. That holds for parallel layers as well.

    Raises :class:`ValueError` for a layer or a part that does not exist and for a model whose
    layers or parts cannot be found.
    """
    layers = find_decoder(model).layers
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: got {layer}, allowed: 0 to {len(layers) - 1}")
    if part not in _PARTS:
        raise ValueError(f"part: got {part!r}, allowed: {' or '.join(_PARTS)}")
    handle = _part_of(layers[layer], layer, part).register_forward_hook(_zeros)
    try:
        yield
    finally:
        handle.remove()


def measure_part_quality(
    model: nn.Module, windows: Iterable[torch.Tensor], layer: int
) -> dict[Part, Quality]:
    """Measure the quality of a transformers model without each part of one layer.

    ``windows`` are the token ids of two or more pieces of text, [length] each; all tokens but the
    first of each are predicted. Raises what :func:`without_part` and
    :func:`pruning.quality.measure_quality` do.
    """
    import torch

    options = inference_options(model)
    sums: dict[Part, list[list[float]]] = {part: [] for part in _PARTS}
    with torch.inference_mode():
        for window in windows:
            reference = next_token_logits(model, window, options)
            for part, of_part in sums.items():
                with without_part(model, layer, part):
                    logits = next_token_logits(model, window, options)
                of_part.append(paired_statistics(logits, reference, window[1:]).tolist())
    return {part: quality_of_windows(of_part) for part, of_part in sums.items()}


def _refuse_damage(sums: dict[str, list[list[float]]]) -> None:
    # Checked in the order in which the parts run, because damage spreads to all later parts.
    for layer in range(len(sums["attention"])):
        for part, of_part in sums.items():
            if not all(map(math.isfinite, of_part[layer])):
                raise ImportanceError(
                    f"layer {layer}, {part}: the influence is not finite: among the states of "
                    f"{of_part[layer][0]:.0f} tokens is a NaN, an infinity or a zero vector"
                )


def _zeros(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    # Multiplying by zero would keep a NaN.
    if isinstance(output, tuple):
        return (output[0].new_zeros(output[0].shape), *output[1:])
    return output.new_zeros(output.shape)


def _part_of(module: nn.Module, layer: int, part: Part) -> nn.Module:
    found = _child(module, _PARTS[part])
    if found is None:
        raise ValueError(
            f"layer {layer}: {type(module).__name__} has no {part} part that is known "
            f"(looked for: {', '.join(_PARTS[part])})"
        )
    return found


def _child(module: nn.Module, names: Iterable[str]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    # Damaged states count as equal here; block_influence refuses them.
    return torch.allclose(a.reshape(b.shape), b, rtol=0, atol=0, equal_nan=True)


def _refusal(layers: Sequence[nn.Module], layer: int, reason: str) -> ValueError:
    return ValueError(
        f"layer {layer}: {type(layers[layer]).__name__} cannot be measured by parts: {reason}; "
        "allowed: layers that add attention and then feed-forward to the stream, each after a norm "
        "of its own. A parallel layer has no stream between its parts"
    )
