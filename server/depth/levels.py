"""Levels: operating points that an operator has named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from pruning.depths import check_depth, depth_of_prune_ratio
from server.errors import InvalidArgument

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_DEFAULT_SHARES = {
    "dense": Fraction(1),
    "balanced": Fraction(3, 4),
    "fast": Fraction(1, 2),
    "turbo": Fraction(1, 4),
}


@dataclass(frozen=True, slots=True, order=True)
class DepthPair:
    """How many layers run for prompt tokens and for generated ones."""

    prefill_layers: int
    decode_layers: int


@dataclass(frozen=True, slots=True)
class Level:
    """An operating point: a name for a pair of depths, in layers."""

    name: str
    prefill_layers: int
    decode_layers: int

    def __str__(self) -> str:
        """Return the level as it is written in a flag."""
        if self.prefill_layers == self.decode_layers:
            return f"{self.name}={self.decode_layers}"
        return f"{self.name}={self.prefill_layers}/{self.decode_layers}"

    @property
    def depths(self) -> DepthPair:
        return DepthPair(self.prefill_layers, self.decode_layers)


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """A level as the settings write it: an int is a number of layers, a float a prune ratio."""

    name: str
    depth: int | float
    # None: the same as depth.
    prefill_depth: int | float | None = None

    def resolve(self, num_layers: int, field: str | None = None) -> Level:
        """Return the level for a model with ``num_layers`` layers.

        Errors call the level ``field``, by default ``levels.NAME``. Raises
        :class:`InvalidArgument`, naming for example ``levels.fast.prefill_depth``, for a depth
        that the model does not have and for a name that is not allowed.
        """
        field = field or f"levels.{self.name}"
        _check_name(self.name, f"{field}.name")
        decode_layers = layers_of(self.depth, num_layers, f"{field}.depth")
        prefill_layers = decode_layers
        if self.prefill_depth is not None:
            prefill_layers = layers_of(self.prefill_depth, num_layers, f"{field}.prefill_depth")
        return Level(self.name, prefill_layers, decode_layers)


def default_levels(num_layers: int) -> tuple[Level, ...]:
    """Return dense, balanced, fast and turbo: all layers, 3/4, 1/2 and 1/4 of them, rounded down.

    If two of them are the same depth, because the model is shallow, only the first is kept.
    """
    names: dict[int, str] = {}
    for name, share in _DEFAULT_SHARES.items():
        names.setdefault(max(int(num_layers * share), 1), name)
    return tuple(Level(name, depth, depth) for depth, name in names.items())


def check_levels(levels: Iterable[Level], field: str = "levels") -> tuple[Level, ...]:
    """Return the levels; raise :class:`InvalidArgument` for no level and for a repeated name."""
    checked = tuple(levels)
    if not checked:
        raise InvalidArgument(field, [], "at least one level")
    names = [level.name for level in checked]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidArgument(f"{field}[{i}].name", name, "a name that no other level has")
    return checked


def layers_of(depth: int | float, num_layers: int, field: str) -> int:
    """Return how many layers run at ``depth``: an int is layers, a float a prune ratio.

    Raises :class:`InvalidArgument` outside 1..``num_layers``, and outside [0, 1) for a ratio.
    """
    if isinstance(depth, float):
        try:
            return depth_of_prune_ratio(num_layers, depth)
        except ValueError:
            allowed = "0 or more and less than 1"
            raise InvalidArgument(field, depth, allowed) from None
    try:
        check_depth(num_layers, depth)
    except ValueError:
        raise InvalidArgument(field, depth, f"1 to {num_layers}") from None
    return depth


def _check_name(name: str, field: str) -> None:
    """Raise :class:`InvalidArgument` for a name that does not suit a flag and a metric label."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            field,
            name,
            "a name of at most 64 letters, digits, '_', '-' and '.', the first a letter or a digit",
        )
