"""Levels: operating points that an operator has named."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from pruning.depths import check_depth, depth_of_prune_ratio
from server.errors import InvalidArgument

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# Those of engines that run the depths of their levels alone.
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

    def __str__(self) -> str:
        """Return the depths as a flag has them: 12 where they are the same, else 8/12."""
        if self.prefill_layers == self.decode_layers:
            return str(self.decode_layers)
        return f"{self.prefill_layers}/{self.decode_layers}"


class Limit(enum.Enum):
    """What a level may be limited in losing; the values are the names of the settings."""

    QUALITY = "max_quality_loss"
    WRITING = "max_writing_loss"
    CHOOSING = "max_choosing_loss"

    @property
    def word(self) -> str:
        """What a loss is called in words; that of perplexity is just a loss."""
        return {Limit.QUALITY: "", Limit.WRITING: "writing ", Limit.CHOOSING: "choosing "}[self]


def _limits(limited: Level | LevelSpec) -> dict[Limit, float]:
    found = ((kind, getattr(limited, kind.value)) for kind in Limit)
    return {kind: limit for kind, limit in found if limit is not None}


@dataclass(frozen=True, slots=True)
class Level:
    """An operating point: a name for a pair of depths, in layers.

    The depths of a level with a limit were chosen for it; see :class:`LevelSpec`.
    """

    name: str
    prefill_layers: int
    decode_layers: int
    max_quality_loss: float | None = None
    max_writing_loss: float | None = None
    max_choosing_loss: float | None = None

    def __str__(self) -> str:
        """Return the level as it is written in a flag, and what it may lose."""
        losses = ", ".join(f"{kind.word}loss {limit:g}" for kind, limit in self.limits.items())
        return f"{self.name}={self.depths}{losses and f' ({losses})'}"

    @property
    def limits(self) -> dict[Limit, float]:
        """What the level may lose, of each kind that it has a limit of."""
        return _limits(self)

    @property
    def depths(self) -> DepthPair:
        return DepthPair(self.prefill_layers, self.decode_layers)


@dataclass(frozen=True, slots=True)
class LevelSpec:
    """A level as the settings write it: by its depth, or by what it may lose.

    A depth is a number of layers if it is an int, and a prune ratio if it is a float. With a limit
    the depth is to be searched for, and with several limits it keeps to all of them:
    ``max_quality_loss`` is perplexity divided by that of the dense model, minus 1;
    ``max_writing_loss`` is the same of what the level writes, where repetition counts as well
    (:attr:`pruning.probes.Writing.loss`); ``max_choosing_loss`` is the accuracy of the dense
    model's choices minus that of the level's. ``prompt_only``: generated tokens run all layers. An
    ``optional`` level does not exist where only the dense model is good enough, or where another
    has its depth.
    """

    name: str
    depth: int | float | None = None
    # None: the same as depth.
    prefill_depth: int | float | None = None
    max_quality_loss: float | None = None
    prompt_only: bool = False
    optional: bool = False
    max_writing_loss: float | None = None
    max_choosing_loss: float | None = None

    @property
    def is_searched(self) -> bool:
        """Whether the depth follows from what the level may lose."""
        return bool(self.limits)

    @property
    def limits(self) -> dict[Limit, float]:
        """What the level may lose, of each kind that it has a limit of."""
        return _limits(self)

    def resolve(self, num_layers: int, field: str | None = None) -> Level:
        """Return the level for a model with ``num_layers`` layers.

        One that is to be searched for has all layers, until :mod:`server.depth.level_search` has
        found it. Errors call the level ``field``, by default ``levels.NAME``. Raises
        :class:`InvalidArgument`, naming for example ``levels.fast.prefill_depth``, for a depth
        that the model does not have, for a loss that is not possible, and for a name that is not
        allowed.
        """
        field = field or f"levels.{self.name}"
        _check_name(self.name, f"{field}.name")
        if self.is_searched:
            self._check_search(field)
            return self.at(num_layers, num_layers)
        if self.prompt_only:
            allowed = (
                "true beside a limit of what the level may lose alone; prefill_depth prunes the "
                "prompt to a depth"
            )
            raise InvalidArgument(f"{field}.prompt_only", True, allowed)
        if self.depth is None:
            raise InvalidArgument(
                f"{field}.depth",
                None,
                "a depth, or max_quality_loss, max_writing_loss or max_choosing_loss in its place",
            )
        decode_layers = layers_of(self.depth, num_layers, f"{field}.depth")
        prefill_layers = decode_layers
        if self.prefill_depth is not None:
            prefill_layers = layers_of(self.prefill_depth, num_layers, f"{field}.prefill_depth")
        return Level(self.name, prefill_layers, decode_layers)

    def at(self, depth: int, num_layers: int) -> Level:
        """Return the level that has been searched for, at the depth that was found for it."""
        decode_layers = num_layers if self.prompt_only else depth
        return Level(
            self.name,
            depth,
            decode_layers,
            self.max_quality_loss,
            self.max_writing_loss,
            self.max_choosing_loss,
        )

    def refuse_search(self, field: str | None = None) -> None:
        """Raise :class:`InvalidArgument` for a level that has no depth of its own."""
        for kind, limit in self.limits.items():
            allowed = (
                "a depth in its place: dedicated engines run the depths of their levels alone, so "
                "none can be tried; an elastic engine finds depths, which its GetModel shows"
            )
            field = field or f"levels.{self.name}"
            raise InvalidArgument(f"{field}.{kind.value}", limit, allowed)

    def _check_search(self, field: str) -> None:
        for kind, limit in self.limits.items():
            if kind is Limit.CHOOSING and not 0 <= limit <= 1:
                raise InvalidArgument(f"{field}.{kind.value}", limit, "0 to 1")
            if not 0 <= limit < math.inf:
                raise InvalidArgument(f"{field}.{kind.value}", limit, "0 or more")
        first = next(iter(self.limits)).value
        for name in ("depth", "prefill_depth"):
            if getattr(self, name) is not None:
                allowed = f"nothing beside {first}, which decides about the depth"
                raise InvalidArgument(f"{field}.{name}", getattr(self, name), allowed)


# Those of engines that run any depth. The text right before a token tells most about it, and the
# prompt is far away from most of the text that is scored. So perplexity hardly shows what becomes
# of a prompt, and little of it may be lost.
DEFAULT_LEVELS = (
    LevelSpec("dense", 0.0),
    LevelSpec("balanced", max_quality_loss=0.1, optional=True),
    LevelSpec("fast", max_quality_loss=0.25, optional=True),
    LevelSpec("turbo", max_quality_loss=1.0, optional=True),
    LevelSpec("prompt", max_quality_loss=0.05, prompt_only=True, optional=True),
)


def default_levels(num_layers: int) -> tuple[Level, ...]:
    """Return the default levels where depths cannot be tried, and so not searched for.

    They are dense, balanced, fast and turbo: all layers, 3/4, 1/2 and 1/4 of them, rounded down.
    If two of them are the same depth, because the model is shallow, only the first is kept.
    """
    names: dict[int, str] = {}
    for name, share in _DEFAULT_SHARES.items():
        names.setdefault(max(int(num_layers * share), 1), name)
    return tuple(Level(name, depth, depth) for depth, name in names.items())


def spec_of(level: Level) -> LevelSpec:
    """Return what asks for a level with these depths, whatever they may lose."""
    return LevelSpec(level.name, level.decode_layers, level.prefill_layers)


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
