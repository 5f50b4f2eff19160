"""Repair maps of a model that transformers has loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, find_decoder, observed
from pruning.repair.fit import fit_map
from pruning.repair.gram import GramEstimator
from pruning.repair.maps import LayerMap, RepairMaps
from pruning.repair.windows import split_windows

if TYPE_CHECKING:
    import torch
    from torch import nn


def fit_repair(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    *,
    model_fingerprint: str,
    text_fingerprint: str,
    group_size: int | None = None,
    layers: Sequence[nn.Module] | None = None,
    on_fitted: Callable[[int, int], None] | None = None,
) -> RepairMaps:
    """Fit a map for every decoder layer of a transformers model.

    ``windows`` are token ids, [length] each. ``group_size`` is how many layers are measured in
    one pass over them, all by default; each takes 32 x hidden^2 bytes meanwhile. ``on_fitted``
    is told how many layers are done, and how many there are. The maps are float32.

    Raises :class:`ValueError` for a model in training mode and for one whose layers cannot be
    found; :class:`RepairError` for too little text and for states that are not finite.
    """
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    num_layers = len(decoder.layers)
    fit_windows, held_out_windows = split_windows(windows)
    maps: dict[int, LayerMap] = {}
    size = num_layers if group_size is None else group_size
    if size < 1:
        raise ValueError(f"group_size: got {size}, allowed: 1 or more")

    def sums(of: Sequence[torch.Tensor], group: Sequence[int]) -> GramEstimator:
        estimator = GramEstimator(group)

        def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
            estimator.update(layer, passes.valid_tokens(before), passes.valid_tokens(after))

        with observed(decoder.layers, observe):
            passes.run((window[None] for window in of), None)
        return estimator

    for start in range(0, num_layers, size):
        group = range(start, min(start + size, num_layers))
        fit, held_out = sums(fit_windows, group), sums(held_out_windows, group)
        for layer in group:
            fitted = fit_map(layer, fit.take(layer), held_out.take(layer))
            maps[layer] = LayerMap(fitted.weight.float(), fitted.ridge, fitted.unexplained)
            if on_fitted is not None:
                on_fitted(len(maps), num_layers)
    return RepairMaps(
        layers=maps,
        num_layers=num_layers,
        model_fingerprint=model_fingerprint,
        text_fingerprint=text_fingerprint,
        num_tokens=sum(map(len, fit_windows)),
    )
