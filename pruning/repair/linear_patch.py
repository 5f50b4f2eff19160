"""Patches between layers: a rotation, a scale for each channel, and the rotation back.

LinearPatch (arXiv 2505.24680) puts P = H D H^T where layers were removed, with H an orthogonal
Hadamard matrix, which spreads the few very large channels of a stream over all, and D a diagonal
of scales. The stream x before the gap becomes x P there, see :func:`fit_stream_patches`.

Half of it reaches a plain checkpoint. x is y + a: y the stream before the last MLP, a what that
MLP adds, a product with a matrix. ``a P`` can be multiplied into that matrix; y goes to the next
layer, whose norm no matrix comes before, so ``y P`` cannot. (Multiplying P into all that is written
before the gap would give x P, but the layers before the gap would read x P as well, and their norms
do not commute with P.) :func:`fit_linear_patches` therefore gives a map of the same form that acts
on a alone. Its scales are those with which y + a P comes closest to the stream behind the gap: with
A = a H and G what the gap adds, times H, the scale of channel j is 1 + sum A_j G_j / sum A_j^2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, StandIn, find_decoder, observed
from pruning.repair.errors import RepairError
from pruning.repair.folding import Fold, gaps, observe_gaps, runs_of
from pruning.repair.hadamard import rotation
from pruning.repair.windows import split_windows

if TYPE_CHECKING:
    import torch
    from torch import nn

# A scale is a ratio of two sums for one channel alone, so few tokens are enough.
_MIN_TOKENS = 64


@dataclass(slots=True)
class _ChannelSums:
    """Sums over tokens, for each rotated channel: of A^2, A G and G^2, float64 [hidden]."""

    squares: torch.Tensor | float = 0.0
    products: torch.Tensor | float = 0.0
    energy: torch.Tensor | float = 0.0
    num_tokens: int = 0


def fit_linear_patches(
    model: nn.Module, windows: Sequence[torch.Tensor], removed: Sequence[int]
) -> tuple[Fold, ...]:
    """Fit a map for every one of :func:`pruning.repair.folding.gaps` on a transformers model.

    ``windows`` are token ids, [length] each; one in eight is held out to measure what the maps
    leave unexplained. Raises :class:`RepairError` for too little text, for states that are not
    finite, for layers without a down projection and for a hidden size without a Hadamard matrix.
    """
    import torch

    turn = _rotation_of(model)
    runs = {run[0] - 1: run for run in gaps(removed)}

    def sums(of: Sequence[torch.Tensor]) -> dict[int, _ChannelSums]:
        found = {layer: _ChannelSums() for layer in runs}

        def observe(layer: int, added: torch.Tensor, gained: torch.Tensor) -> None:
            of_layer, a, g = found[layer], added @ turn, gained @ turn
            of_layer.squares = of_layer.squares + a.square().sum(0)
            of_layer.products = of_layer.products + (a * g).sum(0)
            of_layer.energy = of_layer.energy + g.square().sum(0)
            of_layer.num_tokens += len(a)

        observe_gaps(model, of, removed, observe)
        return found

    parts = split_windows(windows)
    _check_tokens(parts[0])
    fit, held_out = map(sums, parts)
    folds = []
    for layer, run in sorted(runs.items()):
        squares, products = (
            torch.as_tensor(fit[layer].squares),
            torch.as_tensor(fit[layer].products),
        )
        _check_finite(layer, squares, products)
        # A channel in which the MLP adds nothing keeps its scale.
        scales = torch.where(squares > 0, products / squares.clamp(min=1e-300), 0.0)
        test = held_out[layer]
        left = scales.square() * test.squares - 2 * scales * test.products + test.energy
        unexplained = float(left.sum() / torch.as_tensor(test.energy).sum())
        folds.append(Fold(layer, run, (turn * scales) @ turn.T, 0.0, unexplained))
    return tuple(folds)


def fit_stream_patches(
    model: nn.Module, windows: Sequence[torch.Tensor], removed: Sequence[int]
) -> dict[int, StandIn]:
    """Return the patches of the paper, for :func:`pruning.decoder.without_layers`.

    Each acts on the whole stream, in place of the first layer of its gap; the scale of a channel is
    the mean of its absolute values behind the gap, divided by that before it, both rotated. Raises
    as :func:`fit_linear_patches` does.
    """
    import torch

    turn = _rotation_of(model)
    runs = {run[0]: run for run in runs_of(removed)}
    ends = {run[-1]: first for first, run in runs.items()}
    decoder = find_decoder(model)
    passes = ForwardPasses(decoder)
    _check_tokens(windows)
    sums: dict[tuple[int, str], torch.Tensor] = {}

    def add(first: int, side: str, states: torch.Tensor) -> None:
        size = (passes.valid_tokens(states).double() @ turn).abs().sum(0)
        sums[first, side] = sums.get((first, side), torch.zeros_like(size)) + size

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        if layer in runs:
            add(layer, "before", before)
        if layer in ends:
            add(ends[layer], "behind", after)

    with observed(decoder.layers, observe):
        passes.run((window[None] for window in windows), None)
    patches: dict[int, StandIn] = {}
    for first in runs:
        before, behind = sums[first, "before"], sums[first, "behind"]
        _check_finite(first, before, behind)
        scales = torch.where(before > 0, behind / before.clamp(min=1e-300), 1.0)
        patches[first] = _multiplying((turn * scales) @ turn.T)
    return patches


def _multiplying(patch: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: states @ patch.to(states)


def _rotation_of(model: nn.Module) -> torch.Tensor:
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    config = model.config
    return rotation(int(config.get_text_config().hidden_size)).to(embeddings.device)  # type: ignore[union-attr,operator]


def _check_tokens(windows: Sequence[torch.Tensor]) -> None:
    if (num_tokens := sum(map(len, windows))) < _MIN_TOKENS:
        raise RepairError(
            f"text: got {num_tokens} tokens to fit patches on, allowed: {_MIN_TOKENS} or more"
        )


def _check_finite(layer: int, *sums: torch.Tensor) -> None:
    if not all(bool(each.isfinite().all()) for each in sums):
        raise RepairError(
            f"layer {layer}: the fit of its patch is not finite: among the states is a NaN or an "
            "infinity"
        )
