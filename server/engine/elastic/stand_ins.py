"""What does the work of a layer for the tokens that skip it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pruning.repair import RepairError, load_maps, maps_fingerprint

# A repair map, [hidden_size, hidden_size], of the model's type and on its device.
StandIn = torch.Tensor


class StandIns:
    """The stand-ins of a model's layers, by the maps that they are of; none until some are loaded.

    The row table has a number for each file of maps.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self._num_layers = num_layers
        self._hidden_size = hidden_size
        self._by_number: dict[int, Mapping[int, StandIn]] = {}

    def read(
        self, path: Path, fingerprint: str, dtype: torch.dtype, device: torch.device
    ) -> dict[int, StandIn]:
        """Return the maps in ``path``, which have this fingerprint, by layer.

        Raises :class:`pruning.repair.RepairError` for maps that are damaged, that have been
        replaced by others or that do not fit the model, and :class:`OSError` for a file that
        cannot be read.
        """
        if (found := maps_fingerprint(path)) != fingerprint:
            raise RepairError(f"{path}: found the maps {found}, allowed: {fingerprint}")
        maps = load_maps(path)
        maps.check_model(maps.model_fingerprint, self._num_layers, self._hidden_size)
        by_layer = {
            layer: stand_in.weight.to(device, dtype) for layer, stand_in in maps.layers.items()
        }
        for layer, weight in by_layer.items():
            if not bool(weight.isfinite().all()):
                raise RepairError(f"{path}: layer {layer}: its map does not fit into {dtype}")
        return by_layer

    def put(self, number: int, by_layer: Mapping[int, StandIn]) -> None:
        """Let these stand in for requests whose maps have this number."""
        self._by_number[number] = by_layer

    def of(self, number: int, layer: int) -> StandIn:
        return self._by_number[number][layer]


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
