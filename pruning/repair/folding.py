"""Repair that can be folded into a checkpoint that has lost layers.

For every run of removed layers, a map on what the MLP of the layer before them adds. With Y the
stream before that MLP, A the MLP's output and X the stream behind the removed layers, all on the
dense model, ::

    M = argmin |Y + A (I + M) - X|^2 + ridge |M|^2

as ReplaceMe (arXiv 2505.02819, equation 4) fits its map for one cut. A is a product with the
down projection W, so (I + M)^T W takes the place of W and nothing is added to the model. The
maps x + x M of :mod:`pruning.repair.fit` cannot be folded: they also act on Y, which reaches the
next layer by no matrix.

:mod:`pruning.repair.linear_patch` fits maps of another form for the same place.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.decoder import ForwardPasses, find_decoder, observed
from pruning.repair.errors import RepairError
from pruning.repair.fit import fit_map
from pruning.repair.gram import GramEstimator
from pruning.repair.windows import split_windows

if TYPE_CHECKING:
    import torch
    from torch import nn

# Families that add the product with mlp.down_proj to the residual stream as it is.
_FOLDABLE = frozenset({"gemma", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3"})
_NORM_BEHIND = frozenset({"gemma2", "gemma3", "gemma3_text"})
# Of a layer; its output is what the MLP adds.
DOWN_PROJECTION = "mlp.down_proj"


class FoldMethod(enum.Enum):
    """How a map that is folded into a checkpoint is fitted."""

    REPLACE_ME = "folded"
    LINEAR_PATCH = "linear-patch"


@dataclass(frozen=True, slots=True)
class Fold:
    """A map on what the MLP of ``layer`` adds: a becomes a + a ``weight``, [hidden, hidden].

    It stands in for ``removed``, the layers behind it. ``ridge`` and ``unexplained`` are as in
    :class:`pruning.repair.fit.FittedMap`.
    """

    layer: int
    removed: tuple[int, ...]
    weight: torch.Tensor
    ridge: float
    unexplained: float

    def __call__(self, added: torch.Tensor) -> torch.Tensor:
        return added + added @ self.weight.to(added)

    def projection(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of a down projection, [hidden, ...], or of its bias."""
        result = weight.double() + self.weight.double().T @ weight.double()
        result = result.to(weight.dtype)
        if not bool(result.isfinite().all()):
            raise RepairError(f"layer {self.layer}: its map does not fit into {weight.dtype}")
        return result


@dataclass(frozen=True, slots=True)
class FoldedRepair:
    """The maps that a checkpoint gets, and what they were fitted on.

    The perplexities are on held-out text: of the dense model, and without the removed layers
    before and after the maps were folded in.
    """

    folds: tuple[Fold, ...]
    num_tokens: int
    text_fingerprint: str
    dense_perplexity: float
    plain_perplexity: float
    perplexity: float
    num_held_out_tokens: int
    method: FoldMethod = FoldMethod.REPLACE_ME


def check_foldable(config: Mapping[str, Any]) -> None:
    """Raise :class:`RepairError`, with the reason, for a model into which no map can be folded."""
    model_type = str(config.get("model_type"))
    if config.get("quantization_config") is not None:
        problem = "its weights are quantized; fold repair into the model that they were made of"
    elif model_type in _NORM_BEHIND:
        problem = "a norm follows its MLPs, so no weight takes what they add to the residual stream"
    elif any("expert" in key and config[key] for key in config):
        problem = "it has experts, and which of them run depends on the token"
    elif model_type not in _FOLDABLE:
        problem = "it is not known to add the product with mlp.down_proj to the residual stream"
    else:
        return
    raise RepairError(
        f"repair: cannot be folded into a model of type {model_type}: {problem}; allowed: "
        f"models of type {', '.join(sorted(_FOLDABLE))} with weights that are not quantized"
    )


def runs_of(layers: Collection[int]) -> list[tuple[int, ...]]:
    """Return the runs of consecutive numbers among ``layers``, ascending."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [tuple(run) for run in runs]


def gaps(removed: Collection[int]) -> list[tuple[int, ...]]:
    """Return the runs of consecutive layers among ``removed``, without one that begins at 0.

    No layer comes before that one, so nothing can stand in for it.
    """
    return [run for run in runs_of(removed) if run[0] > 0]


def fit_folds(
    model: nn.Module, windows: Sequence[torch.Tensor], removed: Sequence[int]
) -> tuple[Fold, ...]:
    """Fit a map for every one of :func:`gaps` on a transformers model.

    ``windows`` are token ids, [length] each. Each gap takes 32 x hidden^2 bytes meanwhile. Raises
    :class:`RepairError` for too little text, for states that are not finite and for layers
    without a down projection.
    """
    runs = {run[0] - 1: run for run in gaps(removed)}

    def sums(of: Sequence[torch.Tensor]) -> GramEstimator:
        estimator = GramEstimator(runs)

        def observe(layer: int, added: torch.Tensor, gained: torch.Tensor) -> None:
            estimator.update(layer, added, added + gained)

        observe_gaps(model, of, removed, observe)
        return estimator

    parts = split_windows(windows)
    fit, held_out = map(sums, parts)
    folds = []
    for layer, run in sorted(runs.items()):
        fitted = fit_map(layer, fit.take(layer), held_out.take(layer))
        folds.append(Fold(layer, run, fitted.weight, fitted.ridge, fitted.unexplained))
    return tuple(folds)


def observe_gaps(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    removed: Sequence[int],
    observe: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Call ``observe(layer, added, gained)`` for each of :func:`gaps` and each window.

    ``layer`` is the one before the gap, ``added`` what its MLP adds to the stream and ``gained``
    what the layers of the gap add, on the dense model: float64 [num_tokens, hidden] each. Raises
    :class:`RepairError` for layers without a down projection.
    """
    decoder = find_decoder(model)
    passes = ForwardPasses(decoder)
    runs = {run[0] - 1: run for run in gaps(removed)}
    ends = {run[-1]: layer for layer, run in runs.items()}
    added: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}

    def on_layer(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if layer in runs:
            left[layer] = passes.valid_tokens(after).double()
        if layer in ends:
            previous = ends[layer]
            gained = passes.valid_tokens(after).double() - left.pop(previous)
            observe(previous, passes.valid_tokens(added.pop(previous)).double(), gained)

    with ExitStack() as hooks:
        hooks.enter_context(observed(decoder.layers, on_layer))
        for layer in runs:
            hooks.callback(_keeping(decoder.layers[layer], layer, added).remove)
        passes.run((window[None] for window in windows), None)


@contextmanager
def folded(model: nn.Module, folds: Sequence[Fold]) -> Iterator[None]:
    """Apply ``folds`` to the outputs of the down projections of ``model``, while in context."""
    layers = find_decoder(model).layers
    with ExitStack() as hooks:
        for fold in folds:
            projection = _down_projection(layers[fold.layer], fold.layer)
            hooks.callback(projection.register_forward_hook(_applying(fold)).remove)
        yield


def _applying(fold: Fold) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
    return lambda module, args, output: fold(output)


def _keeping(module: nn.Module, layer: int, added: dict[int, torch.Tensor]) -> Any:
    def hook(projection: nn.Module, args: Any, output: torch.Tensor) -> None:
        added[layer] = output

    return _down_projection(module, layer).register_forward_hook(hook)


def _down_projection(module: nn.Module, layer: int) -> nn.Module:
    try:
        return module.get_submodule(DOWN_PROJECTION)
    except AttributeError:
        raise RepairError(
            f"repair: cannot be folded: layer {layer} has no {DOWN_PROJECTION}"
        ) from None
