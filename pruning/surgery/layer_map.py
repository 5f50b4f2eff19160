"""The layers that stay, and their new numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The layers 0..``num_layers`` - 1 without ``removed``, which is ascending."""

    num_layers: int
    removed: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        removed = set(self.removed)
        return tuple(layer for layer in range(self.num_layers) if layer not in removed)

    @property
    def depth(self) -> int:
        return self.num_layers - len(self.removed)

    def new_index(self, layer: int) -> int | None:
        """Return the new number of a layer, None for one that is removed.

        Layers beyond the last, which some checkpoints have for drafting tokens, move up.
        """
        position = bisect_left(self.removed, layer)
        if position < len(self.removed) and self.removed[position] == layer:
            return None
        return layer - position

    def num_kept_below(self, layer: int) -> int:
        """Return how many of the layers 0..``layer`` - 1 stay."""
        return layer - bisect_left(self.removed, layer)

    def cut(self, values: Sequence[T]) -> list[T]:
        """Return the ``values`` of the layers that stay, out of one value for each layer."""
        return [values[layer] for layer in self.kept]

    def renumber(self, layers: Iterable[int]) -> list[int]:
        """Return the new numbers of ``layers``, without those that are removed."""
        return [new for layer in layers if (new := self.new_index(layer)) is not None]
