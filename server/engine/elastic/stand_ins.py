"""What does the work of layers for the tokens that skip them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pruning.repair import GatedMlp, GatedMlps, RepairError, load_stand_ins, maps_fingerprint


class StandIn(Protocol):
    """What is in the place of layers, in the model's type and on its device."""

    def added(self, states: torch.Tensor, /) -> torch.Tensor:
        """Return what it adds to the stream in front of the layers, [num_tokens, hidden_size]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A repair map, or the product of some: it adds x ``weight``, [hidden_size, hidden_size]."""

    weight: torch.Tensor

    def added(self, states: torch.Tensor, /) -> torch.Tensor:
        return states @ self.weight


class StandIns:
    """The stand-ins of a model's layers, by the file that they are of; none until some are loaded.

    The row table has a number for each file. A file of maps has one for each layer. One of gated
    MLPs has one for each run of skipped layers, under the run's first layer, and nothing for the
    others: there the stream passes by, and keys and values are made of what the MLP has left.
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
        """Return the stand-ins in ``path``, which have this fingerprint, by layer.

        Raises :class:`pruning.repair.RepairError` for those that are damaged, that have been
        replaced by others or that do not fit the model, and :class:`OSError` for a file that
        cannot be read.
        """
        if (found := maps_fingerprint(path)) != fingerprint:
            raise RepairError(f"{path}: found the maps {found}, allowed: {fingerprint}")
        loaded = load_stand_ins(path)
        loaded.check_model(loaded.model_fingerprint, self._num_layers, self._hidden_size)
        by_layer: dict[int, StandIn] = {}
        for layer, stand_in in loaded.layers.items():
            weight = stand_in.weight.to(device, dtype)
            is_mlp = isinstance(loaded, GatedMlps)
            if not bool(weight.isfinite().all()):
                what = "MLP" if is_mlp else "map"
                raise RepairError(f"{path}: layer {layer}: its {what} does not fit into {dtype}")
            by_layer[layer] = GatedMlp(weight) if is_mlp else LinearMap(weight)
        return by_layer

    def put(self, number: int, by_layer: Mapping[int, StandIn]) -> None:
        """Let these stand in for requests whose stand-ins have this number."""
        self._by_number[number] = by_layer
        for key in [key for key in self._products if key[0] == number]:
            del self._products[key]

    def of(self, number: int, layers: range) -> StandIn:
        """Return what stands in for neighbouring layers that each have a stand-in, as one.

        A decode step reads each map as a whole, so the product of several costs what one does.
        Every depth that a plan has adds at most one run of neighbouring layers to those of the
        depth above it. So the products that are kept, as many as there are layers, are all that
        its depths need, and take no more memory than the maps. MLPs are never neighbours: the
        layers behind the first one of their run have none.
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


def _product(maps: Sequence[StandIn]) -> LinearMap:
    """Return P with x + x P = x (1 + M1) (1 + M2) ... for maps M1, M2, ..."""
    weights = []
    for each in maps:
        assert isinstance(each, LinearMap), "only maps are neighbours"
        weights.append(each.weight)
    product, *others = (weight.float() for weight in weights)
    for other in others:
        product = product + other + product @ other
    return LinearMap(product.to(weights[0].dtype))


def repair(
    stand_ins: Sequence[StandIn], hidden: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``stand_ins`` one after the other to a stream of ``hidden + residual``.

    Each leaves ``(what it adds to the stream, the stream)``, as a layer leaves what it adds and
    what it received.
    """
    for stand_in in stand_ins:
        residual = hidden + residual
        hidden = stand_in.added(residual)
    return hidden, residual
