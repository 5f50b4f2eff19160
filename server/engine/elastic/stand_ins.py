"""What does the work of a layer for the tokens that skip it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pruning.repair import RepairError, load_maps, maps_fingerprint

# What is added to the stream in the place of layers: a repair map, or the product of some,
# [hidden_size, hidden_size], of the model's type and on its device.
StandIn = torch.Tensor


class StandIns:
    """The stand-ins of a model's layers, by the maps that they are of; none until some are loaded.

    The row table has a number for each file of maps.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        self._num_layers = num_layers
        self._hidden_size = hidden_size
        self._by_number: dict[int, Mapping[int, StandIn]] = {}
        # By number, first and last layer; the one that was used last is at the end.
        self._products: OrderedDict[tuple[int, int, int], StandIn] = OrderedDict()

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
        for key in [key for key in self._products if key[0] == number]:
            del self._products[key]

    def of(self, number: int, layers: range) -> StandIn:
        """Return what stands in for neighbouring layers, as one map.

        A decode step reads each map as a whole, so the product of several costs what one does.
        Every depth that a plan has adds at most one run of neighbouring layers to those of the
        depth above it. So the products that are kept, as many as there are layers, are all that
        its depths need, and take no more memory than the maps.
        """
        by_layer = self._by_number[number]
        if len(layers) == 1:
            return by_layer[layers[0]]
        key = number, layers[0], layers[-1]
        if key not in self._products:
            if len(self._products) >= self._num_layers * len(self._by_number):
                self._products.popitem(last=False)
            self._products[key] = _product([by_layer[layer] for layer in layers])
        self._products.move_to_end(key)
        return self._products[key]


def _product(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return P with x + x P = x (1 + M1) (1 + M2) ... for maps M1, M2, ..."""
    product, *others = (each.float() for each in maps)
    for each in others:
        product = product + each + product @ each
    return product.to(maps[0].dtype)


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
