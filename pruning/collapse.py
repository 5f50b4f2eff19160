"""Layer collapse: later layers are merged into an earlier one by the differences of their weights.

LaCo (arXiv 2402.11187). The weights of layer l take up those of the m layers behind it, ::

    W_l* = W_l + sum over k = 1..m of (W_(l+k) - W_l),

and these layers are removed. A pointer goes from the last layers down to the first. At each place a
merge of up to :data:`MAX_MERGED` layers is tried and kept where the output of the model stays
similar to that of the dense model: the mean cosine over tokens of the states behind the last norm
is above a threshold. After a merge the pointer moves down by :data:`INTERVAL`, else by one.

The paper chooses the threshold for a size by hand. Here a depth is given: the threshold begins at
:data:`FIRST_THRESHOLD` and is lowered by :data:`THRESHOLD_STEP` each time the pointer has passed
all layers and not enough of them are gone. The last merge takes only as many layers as are left to
be removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.decoder import find_decoder, inference_options, without_layers
from pruning.depths import check_depth

if TYPE_CHECKING:
    import torch
    from torch import nn

# Layers that one merge takes up; the paper's C is one more.
MAX_MERGED = 3
INTERVAL = 2
FIRST_THRESHOLD = 0.95
THRESHOLD_STEP = 0.05


class CollapseError(ValueError):
    """Layers cannot be merged."""


@dataclass(frozen=True, slots=True)
class Collapse:
    """Which layers are merged into which.

    ``layers`` maps each layer that stays to the layers of the dense model that its weights are the
    sum of, each with a factor; the factors of one layer sum to 1. ``similarity`` is the mean cosine
    of the model's output to that of the dense model at the end, and ``threshold`` the one that the
    last merge was above, both measured on ``num_tokens`` tokens.
    """

    num_layers: int
    layers: Mapping[int, Mapping[int, float]]
    similarity: float
    threshold: float
    num_tokens: int

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.layers)

    @property
    def merged(self) -> dict[int, tuple[int, ...]]:
        """The layers that have taken up others, and which."""
        return {
            layer: tuple(other for other in sorted(factors) if other != layer)
            for layer, factors in self.layers.items()
            if len(factors) > 1
        }


@dataclass(frozen=True, slots=True)
class CollapsedModel:
    """A collapse with what it was measured on.

    The perplexities are on held-out text: of the dense model, of the model without the removed
    layers as it is, and with these merged into others.
    """

    collapse: Collapse
    text_fingerprint: str
    dense_perplexity: float
    plain_perplexity: float
    perplexity: float
    num_held_out_tokens: int


def check_mergeable(config: Mapping[str, Any]) -> None:
    """Raise :class:`CollapseError`, with the reason, for a model whose layers are not merged."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    if config.get("quantization_config") is not None:
        problem = "its weights are quantized; collapse the model that they were made of"
    elif any("expert" in key and config[key] for key in config):
        problem = "it has experts, and those of two layers have nothing in common but their numbers"
    else:
        return
    raise CollapseError(
        f"method: laco cannot merge the layers of a model of type {config.get('model_type')}: "
        f"{problem}; allowed: dense models whose weights are not quantized"
    )


def collapse_layers(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    depth: int,
    *,
    on_tried: Callable[[int, int], None] | None = None,
) -> Collapse:
    """Merge layers of a transformers model until ``depth`` of them are left.

    ``windows`` are token ids, [length] each. The weights of ``model`` are changed; the layers that
    are removed stay in it, for :func:`pruning.decoder.without_layers`. ``on_tried`` is told how
    many layers are gone and how many are to go, after each merge that was tried.

    Raises :class:`ValueError` for a depth that the model has not, and :class:`CollapseError` for
    layers of different kinds or shapes and for no text.
    """
    layers = find_decoder(model).layers
    check_depth(len(layers), depth)
    num_tokens = sum(map(len, windows))
    if not num_tokens:
        raise CollapseError("text: got no tokens, allowed: at least one")
    _check_alike(layers)
    search = _Search(model, layers, windows)
    search.run(depth, on_tried or (lambda done, total: None))
    return Collapse(
        num_layers=len(layers),
        layers=search.factors,
        similarity=search.similarity,
        threshold=search.threshold,
        num_tokens=num_tokens,
    )


class _Search:
    """The pass over the layers, and what it has merged so far."""

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], windows: Sequence[torch.Tensor]
    ) -> None:
        self.factors: dict[int, dict[int, float]] = {
            layer: {layer: 1.0} for layer in range(len(layers))
        }
        self.similarity = 1.0
        self.threshold = FIRST_THRESHOLD
        self._model = model
        self._decoder = find_decoder(model).module
        self._layers = layers
        self._windows = windows
        self._dense = [self._states(window, ()) for window in windows]
        # Similarities of merges that were tried since the last one that was kept.
        self._tried: dict[tuple[int, int], float] = {}

    def run(self, depth: int, on_tried: Callable[[int, int], None]) -> None:
        num_layers = len(self._layers)
        while True:
            pointer = self._last_place
            while pointer >= 0 and len(self.factors) > depth:
                merged = self._try(pointer, depth)
                on_tried(num_layers - len(self.factors), num_layers - depth)
                pointer = min(pointer - (INTERVAL if merged else 1), self._last_place)
            if len(self.factors) == depth:
                return
            self.threshold = round(self.threshold - THRESHOLD_STEP, 2)

    @property
    def _last_place(self) -> int:
        return max(len(self.factors) - 1 - MAX_MERGED, 0)

    def _try(self, pointer: int, depth: int) -> bool:
        """Merge the layers behind the one in place ``pointer`` of those left, if that may be."""
        left = sorted(self.factors)
        count = min(MAX_MERGED, len(left) - 1 - pointer, len(left) - depth)
        into, taken = left[pointer], left[pointer + 1 : pointer + 1 + count]
        known = self._tried.get((pointer, count))
        if known is not None and known <= self.threshold:
            return False
        kept = self._merge(into, taken)
        removed = {*range(len(self._layers))} - {*left} | {*taken}
        similarity = known if known is not None else self._similarity(sorted(removed))
        if similarity <= self.threshold:
            self._restore(into, kept)
            self._tried[pointer, count] = similarity
            return False
        factors: dict[int, float] = {}
        for layer, weight in ((into, 1.0 - count), *((layer, 1.0) for layer in taken)):
            for source, factor in self.factors[layer].items():
                factors[source] = factors.get(source, 0.0) + weight * factor
        self.factors[into] = factors
        for layer in taken:
            del self.factors[layer]
        self.similarity = similarity
        self._tried.clear()
        return True

    def _merge(self, into: int, taken: Sequence[int]) -> dict[str, torch.Tensor]:
        """Change the weights of layer ``into``; return those that it had."""
        import torch

        others = [dict(self._layers[layer].named_parameters()) for layer in taken]
        kept = {}
        with torch.no_grad():
            for name, parameter in self._layers[into].named_parameters():
                kept[name] = parameter.clone()
                own = parameter.double()
                merged = own.clone()
                for other in others:
                    merged += other[name].double() - own
                parameter.copy_(merged)
        return kept

    def _restore(self, into: int, kept: Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self._layers[into].named_parameters():
                parameter.copy_(kept[name])

    def _similarity(self, removed: Sequence[int]) -> float:
        """Return the mean over tokens of the cosine to the dense model's states."""
        import torch

        total = 0.0
        for window, dense in zip(self._windows, self._dense, strict=True):
            states = self._states(window, removed)
            total += float(torch.cosine_similarity(states, dense, dim=-1).double().sum())
        similarity = total / sum(map(len, self._windows))
        # States that are not finite are similar to nothing.
        return similarity if math.isfinite(similarity) else -1.0

    def _states(self, window: torch.Tensor, removed: Sequence[int]) -> torch.Tensor:
        """Return the states behind the last norm, float32 [length, hidden]."""
        import torch

        options = inference_options(self._decoder)
        with torch.inference_mode(), without_layers(self._layers, removed):
            output = self._decoder(input_ids=window[None], **options)
        states: torch.Tensor = output[0][0].float()
        return states


def _check_alike(layers: Sequence[nn.Module]) -> None:
    """Raise :class:`CollapseError` unless all layers have the same weights."""
    first = _shapes(layers[0])
    for number, layer in enumerate(layers):
        shapes = _shapes(layer)
        for name in sorted(first.keys() | shapes.keys()):
            if first.get(name) != shapes.get(name):
                raise CollapseError(
                    f"method: laco cannot merge layers of different shapes: {name} has "
                    f"{_shown(first.get(name))} in layer 0 and {_shown(shapes.get(name))} in layer "
                    f"{number}; allowed: models whose layers are alike"
                )


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "no such weight" if shape is None else f"the shape {list(shape)}"
