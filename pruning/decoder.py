"""The decoder layers of a transformers model, and hooks on what goes in and out of them.

Models differ: their layers are called ``model.layers``, ``transformer.h`` or ``rwkv.blocks``, take
the residual stream by position or by keyword, and return it alone or first in a tuple. This module
hides these differences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_LISTS = ("layers", "h", "blocks")
_CONTAINERS = (
    "model",
    "transformer",
    "backbone",
    "gpt_neox",
    "rwkv",
    "decoder",
    "language_model",
    "text_model",
    "base_model",
)
# What a skipped layer does to the stream instead, [batch, length, hidden].
StandIn = Callable[["torch.Tensor"], "torch.Tensor"]
# RWKV has the norm of its embeddings in the first layer, where it runs before the layer itself.
_EMBEDDING_NORM = "pre_ln"


@dataclass(frozen=True, slots=True)
class Decoder:
    """The part of a model that turns token ids into hidden states, and its layers in order."""

    module: nn.Module
    layers: Sequence[nn.Module]


def find_decoder(model: nn.Module, layers: Sequence[nn.Module] | None = None) -> Decoder:
    """Return the decoder of ``model``; ``layers`` are its layers if they are given.

    The decoder is the innermost module around the layers that takes ``input_ids``. Running it
    alone leaves out the product with the output embeddings, often the widest of the model.

    Raises :class:`ValueError`, naming what was looked for, for an encoder-decoder, if no layers
    are found, and if no module around them takes ``input_ids``.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: got {type(model).__name__}, an encoder-decoder, allowed: decoder-only models"
        )
    get_decoder = getattr(model, "get_decoder", None)
    root = (get_decoder() if get_decoder is not None else None) or model
    around = [model, root]
    if layers is None:
        path, layers = _search(root) or _search(model) or _not_found(root)
        around += path
    for module in reversed(around):
        if _takes(module, "input_ids"):
            return Decoder(module, layers)
    raise ValueError(
        f"model: got {type(model).__name__}, which takes no argument input_ids, nor does any "
        "module between it and its layers"
    )


class ForwardPasses:
    """Forward passes of batches, and which of their tokens are valid.

    Hooks on the decoder's modules call :meth:`valid_tokens` during :meth:`run`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._module = decoder.module
        self._shape: torch.Size | None = None
        self._valid: torch.Tensor | None = None

    def run(
        self,
        input_ids_batches: Iterable[torch.Tensor],
        attention_masks: Iterable[torch.Tensor] | None,
    ) -> None:
        """Run every batch, [batch, length], without a cache and without gradients.

        Raises :class:`ValueError` for a model in training mode, where dropout would distort the
        states, for masks of another shape than the batches, and for a model that takes no masks.
        """
        import torch

        options = inference_options(self._module)
        with torch.inference_mode():
            if attention_masks is None:
                for input_ids in input_ids_batches:
                    self._shape, self._valid = input_ids.shape, None
                    self._module(input_ids=input_ids, **options)
                return
            if not _takes(self._module, "attention_mask"):
                raise ValueError(
                    f"attention_masks: {type(self._module).__name__} takes no attention_mask, "
                    "allowed: batches without padding and no masks"
                )
            for input_ids, mask in zip(input_ids_batches, attention_masks, strict=True):
                if mask.shape != input_ids.shape:
                    raise ValueError(
                        f"attention_masks: got shape {list(mask.shape)}, "
                        f"allowed: {list(input_ids.shape)}, that of the input ids"
                    )
                self._shape, self._valid = input_ids.shape, mask.bool()
                self._module(input_ids=input_ids, attention_mask=mask, **options)

    def valid_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states of the valid tokens, [num_tokens, hidden].

        ``states`` is [batch, length, hidden]; other shapes raise :class:`ValueError`.
        """
        if states.shape[:-1] != self._shape:
            raise ValueError(
                f"layers: got states of shape {list(states.shape)} for tokens of shape "
                f"{list(self._shape or ())}, allowed: [batch, length, hidden]"
            )
        if self._valid is None:
            return states.flatten(0, -2)
        return states[self._valid.to(states.device)]

    def last_tokens(self) -> torch.Tensor:
        """Return where in :meth:`valid_tokens` the last token of each row is, int64 [batch].

        Rows without a valid token have none.
        """
        import torch

        if self._valid is None:
            batch, length = self._shape or (0, 0)
            return torch.arange(1, batch + 1) * length - 1
        lengths = self._valid.sum(-1)
        return lengths.cumsum(0)[lengths > 0] - 1


def inference_options(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that make ``model`` run without a cache.

    Raises :class:`ValueError` for a model in training mode, where dropout would distort the
    measurement.
    """
    if model.training:
        raise ValueError("model: got a model in training mode, allowed: after model.eval()")
    return {"use_cache": False} if _takes(model, "use_cache") else {}


@contextmanager
def observed(
    layers: Sequence[nn.Module],
    observe: Callable[[int, torch.Tensor, torch.Tensor], None],
    received: dict[int, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Call ``observe(layer, before, after)`` after each forward pass of a layer, while in context.

    ``before`` and ``after`` are the residual stream as the layer receives and returns it. While a
    layer runs, ``received`` holds ``before`` under its number.
    """
    received = {} if received is None else received

    def on_input(layer: int, states: torch.Tensor) -> None:
        received[layer] = states.clone()  # a layer may change the stream in place

    with ExitStack() as hooks:
        for layer, module in enumerate(layers):
            hooks.enter_context(on_stream_into(module, layer, on_input))
            hooks.callback(
                module.register_forward_hook(_output_hook(layer, received, observe)).remove
            )
        yield


@contextmanager
def on_stream_into(
    module: nn.Module, layer: int, receive: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``receive(layer, states)`` before ``module`` runs on ``states``, while in context."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(layer, _states_given_to(module, args, kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_layers(
    layers: Sequence[nn.Module],
    skipped: Collection[int],
    stand_ins: Mapping[int, StandIn] | None = None,
) -> Iterator[None]:
    """Make the layers ``skipped`` return the residual stream unchanged, while in context.

    They still run, so that attention fills its cache and generation works. The model computes the
    same as a checkpoint that :func:`pruning.surgery.export_checkpoint` writes without them. A
    skipped layer that is in ``stand_ins`` returns what its stand-in, such as a
    :class:`pruning.repair.LayerMap`, makes of the stream.

    Raises :class:`ValueError` for a layer that does not exist.
    """
    stand_ins = {} if stand_ins is None else stand_ins
    for layer in skipped:
        if not 0 <= layer < len(layers):
            raise ValueError(f"skipped: got layer {layer}, allowed: 0 to {len(layers) - 1}")
    # Copies, because a layer may change the stream in place.
    received: dict[int, torch.Tensor] = {}

    def on_input(layer: int, states: torch.Tensor) -> None:
        received[layer] = states.clone()

    with ExitStack() as hooks:
        for layer in skipped:
            hooks.enter_context(on_stream_into(layers[layer], layer, on_input))
            hook = _passing_on(layer, received, stand_ins.get(layer))
            hooks.callback(layers[layer].register_forward_hook(hook).remove)
        yield


def _passing_on(
    layer: int, received: dict[int, torch.Tensor], stand_in: StandIn | None
) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = received.pop(layer)
        norm = getattr(module, _EMBEDDING_NORM, None)
        if norm is not None:
            states = norm(states)
        if stand_in is not None:
            states = stand_in(states)
        return type(output)((states, *output[1:])) if isinstance(output, tuple | list) else states

    return hook


def _output_hook(
    layer: int,
    received: dict[int, torch.Tensor],
    observe: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        import torch

        states = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(states, torch.Tensor):
            raise ValueError(
                f"layers: {type(module).__name__} returned {type(output).__name__}, "
                "allowed: the hidden states, alone or first in a tuple"
            )
        observe(layer, received.pop(layer), states)

    return hook


def _states_given_to(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    import torch

    names = ("hidden_states", *list(inspect.signature(module.forward).parameters)[:1])
    given = args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)
    if not isinstance(given, torch.Tensor):
        raise ValueError(
            f"layers: {type(module).__name__} was called without hidden states, allowed: "
            f"as its first argument or by the name {' or '.join(dict.fromkeys(names))}"
        )
    return given


def _search(root: nn.Module) -> tuple[list[nn.Module], Sequence[nn.Module]] | None:
    """Return the nearest list of layers, and the modules from ``root`` to it."""
    from torch import nn

    paths, seen = [[root]], {id(root)}
    for path in paths:
        for name in _LISTS:
            layers = getattr(path[-1], name, None)
            if isinstance(layers, nn.ModuleList) and layers:
                return path, list(layers)
        for name in _CONTAINERS:
            inner = getattr(path[-1], name, None)
            if isinstance(inner, nn.Module) and id(inner) not in seen:
                seen.add(id(inner))
                paths.append([*path, inner])
    return None


def _not_found(root: nn.Module) -> tuple[list[nn.Module], Sequence[nn.Module]]:
    lists = " or ".join(repr(name) for name in _LISTS)
    raise ValueError(
        f"model: {type(root).__name__} has no module list named {lists}, neither itself nor in "
        f"{', '.join(_CONTAINERS)}; pass its decoder layers as the argument layers"
    )


def _takes(module: nn.Module, name: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
