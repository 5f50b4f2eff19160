"""What does the work of a layer for the tokens that skip it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pruning.repair import RepairError, load_maps

# A repair map, [hidden_size, hidden_size], of the model's type and on its device.
StandIn = torch.Tensor


class StandIns:
    """The stand-ins of a model's layers; there are none until some are loaded."""

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self._num_layers = num_layers
        self._hidden_size = hidden_size
        self._by_layer: dict[int, StandIn] = {}

    def load(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Replace all stand-ins by the maps in ``path``.

        Raises :class:`pruning.repair.RepairError` for maps that are damaged or too few, or that
        do not fit the model, and :class:`OSError` for a file that cannot be read.
        """
        maps = load_maps(path)
        maps.check_model(maps.model_fingerprint, self._num_layers, self._hidden_size)
        by_layer = {
            layer: stand_in.weight.to(device, dtype) for layer, stand_in in maps.layers.items()
        }
        for layer, weight in by_layer.items():
            if not bool(weight.isfinite().all()):
                raise RepairError(f"{path}: layer {layer}: its map does not fit into {dtype}")
        self._by_layer = by_layer

    def of(self, layer: int) -> StandIn | None:
        return self._by_layer.get(layer)

    @property
    def layers(self) -> list[int]:
        return sorted(self._by_layer)


def repair(
    stand_ins: Sequence[StandIn], hidden: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``stand_ins`` one after the other to a stream of ``hidden + residual``.

    Each turns the stream x into x + x M, and leaves ``(x M, x)``, as a layer leaves what it adds
    and what it received.
    """
    for stand_in in stand_ins:
        residual = hidden + residual
        hidden = residual @ stand_in
    return hidden, residual
