"""The depth policy: plan, levels and measurements, and the depth that each request gets."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pruning.plan import Plan
from pruning.quality import Quality
from server.depth.levels import DepthPair, Level, LevelSpec, check_levels, layers_of, spec_of
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition, InvalidArgument, UnknownLevel


@dataclass(frozen=True, slots=True)
class Layers:
    """A depth as a number of layers."""

    num_layers: int


@dataclass(frozen=True, slots=True)
class PruneRatio:
    """A depth as the share of layers to skip."""

    ratio: float


@dataclass(frozen=True, slots=True)
class NamedLevel:
    """The depths of the level of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Auto:
    """The server chooses.

    It loses at most ``max_quality_loss``: perplexity divided by that of the dense model, minus 1.
    """

    max_quality_loss: float | None = None


_ONE_DEPTH = "dedicated engines run the same layers for the prompt and for generated tokens"

# None is a request that names no depth.
DepthChoice = Layers | PruneRatio | NamedLevel | Auto | None


class Reason(enum.Enum):
    """Why a request is served at its depth."""

    REQUESTED = "requested"
    DEFAULT = "default"
    AUTO = "auto"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class ServedDepth:
    """The depth that a request is served at, in layers, and why."""

    prefill_layers: int
    decode_layers: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Speed:
    """Decode throughput of ``num_streams`` concurrent requests.

    ``speedup`` is relative to dense, None if dense could not be run.
    """

    tokens_per_second: float
    speedup: float | None
    num_streams: int


@dataclass(frozen=True, slots=True)
class DepthPolicy:
    """Plan and levels of one model, with their measurements.

    It is immutable: the service replaces the whole policy at once, and running requests keep the
    layers that they were given. The first level is the default level, and the level of ``Auto``,
    unless another is named. Without ``any_depth``, requests may only have the depths of levels,
    and a level has the same depth for prompt and generated tokens.

    Raises :class:`UnknownLevel` for a named level that does not exist, and
    :class:`InvalidArgument` for levels that are not possible.
    """

    plan: Plan
    levels: tuple[Level, ...]
    default_level: str = ""
    auto_level: str = ""
    # The level of Auto at present; auto_level is its level without load.
    present_level: str = ""
    # Whether requests that name no depth are served as Auto.
    auto_by_default: bool = False
    # Measured under this plan.
    qualities: Mapping[DepthPair, Quality] = field(default_factory=dict)
    speeds: Mapping[DepthPair, Speed] = field(default_factory=dict)
    any_depth: bool = True
    # The fingerprint of the maps that stand in for skipped layers; None: nothing does.
    repair: str | None = None
    # The levels as they were asked for; by default those that there are.
    specs: tuple[LevelSpec, ...] = ()

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if not self.any_depth:
            for level in self.levels:
                if level.prefill_layers != level.decode_layers:
                    raise InvalidArgument(
                        f"levels.{level.name}.prefill_depth",
                        level.prefill_layers,
                        f"{level.decode_layers}, its depth: {_ONE_DEPTH}",
                    )
        object.__setattr__(self, "specs", self.specs or tuple(map(spec_of, self.levels)))
        for name in ("qualities", "speeds"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "default_level", self.default_level or self.levels[0].name)
        object.__setattr__(self, "auto_level", self.auto_level or self.default_level)
        object.__setattr__(self, "present_level", self.present_level or self.auto_level)
        for name in (self.default_level, self.auto_level, self.present_level):
            self.level(name)

    @property
    def num_layers(self) -> int:
        return self.plan.num_layers

    @property
    def dense(self) -> DepthPair:
        return DepthPair(self.num_layers, self.num_layers)

    def can_have(self, depths: DepthPair) -> bool:
        """Return whether a request may run at these depths."""
        return self.any_depth or any(level.depths == depths for level in self.levels)

    def level_selections(self) -> dict[str, LayerSelection]:
        """Return the layers that each level skips, by its name."""
        return {level.name: self.selection(level.depths) for level in self.levels}

    def level(self, name: str) -> Level:
        """Return the level of that name; raise :class:`UnknownLevel` if there is none."""
        for level in self.levels:
            if level.name == name:
                return level
        raise UnknownLevel(name, [level.name for level in self.levels])

    def selection(self, depths: DepthPair) -> LayerSelection:
        """Return the layers that the plan skips at these depths, and what stands in for them."""
        return LayerSelection(
            prefill_skips=tuple(sorted(self.plan.skipped(depths.prefill_layers))),
            decode_skips=tuple(sorted(self.plan.skipped(depths.decode_layers))),
            repair=None if depths == self.dense else self.repair,
        )

    def resolve(
        self, depth: DepthChoice, prefill_depth: DepthChoice = None
    ) -> tuple[LayerSelection, ServedDepth]:
        """Return the layers that a request skips, and the depth it is served at.

        A level sets both depths, unless ``prefill_depth`` is given.

        Raises :class:`InvalidArgument`, naming the field, for a depth that the request cannot
        have, :class:`UnknownLevel` for a level that does not exist, and
        :class:`FailedPrecondition` if a quality is asked for and none has been measured.
        """
        depths, reason = self._depths(depth, "depth")
        if prefill_depth is not None:
            prefill, _ = self._depths(prefill_depth, "prefill_depth")
            depths = DepthPair(prefill.prefill_layers, depths.decode_layers)
        self._check_depths(depths, depth)
        served = ServedDepth(depths.prefill_layers, depths.decode_layers, reason)
        return self.selection(depths), served

    def with_plan(self, plan: Plan) -> DepthPolicy:
        """Return the policy with another plan, whose quality has not been measured.

        The speeds stay: they depend on how many layers run, not on which.
        """
        return dataclasses.replace(self, plan=plan, qualities={})

    def with_repair(self, repair: str | None) -> DepthPolicy:
        """Return the policy with other maps for skipped layers, which has not been measured."""
        return dataclasses.replace(self, repair=repair, qualities={}, speeds={})

    def with_levels(
        self,
        levels: tuple[Level, ...],
        default_level: str | None,
        specs: tuple[LevelSpec, ...] = (),
    ) -> DepthPolicy:
        """Return the policy with other levels, which were asked for as ``specs`` say.

        Without ``default_level``, the default level stays if it still exists, else the first level
        is the default. The level of ``Auto`` without load stays if it still exists, else it is the
        default level. Load does not count until it is measured again.
        """
        names = {level.name for level in levels}
        kept = self.default_level if self.default_level in names else ""
        qualities, speeds = self.qualities, self.speeds
        if not self.any_depth:  # measurements of a removed level no longer apply to this server
            served = {level.depths for level in levels}
            qualities = {pair: value for pair, value in qualities.items() if pair in served}
            speeds = {pair: value for pair, value in speeds.items() if pair in served}
        return dataclasses.replace(
            self,
            qualities=qualities,
            speeds=speeds,
            levels=levels,
            specs=specs,
            default_level=kept if default_level is None else default_level,
            auto_level=self.auto_level if self.auto_level in names else "",
            present_level="",
        )

    def with_found(self, levels: tuple[Level, ...]) -> DepthPolicy:
        """Return the policy with the levels that were found for its ``specs``.

        Load goes on to count: the level of ``Auto`` at present stays if it still exists.
        """
        names = {level.name for level in levels}
        default, auto, present = (
            name if name in names else ""
            for name in (self.default_level, self.auto_level, self.present_level)
        )
        return dataclasses.replace(
            self, levels=levels, default_level=default, auto_level=auto, present_level=present
        )

    def with_auto_level(self, name: str) -> DepthPolicy:
        """Return the policy with another level of ``Auto`` without load."""
        self.level(name)
        return dataclasses.replace(self, auto_level=name, present_level="")

    def with_present_level(self, name: str) -> DepthPolicy:
        """Return the policy with another level of ``Auto`` at present."""
        return dataclasses.replace(self, present_level=name)

    def with_auto_by_default(self, auto_by_default: bool) -> DepthPolicy:
        return dataclasses.replace(self, auto_by_default=auto_by_default)

    def with_measurements(
        self, qualities: Mapping[DepthPair, Quality], speeds: Mapping[DepthPair, Speed]
    ) -> DepthPolicy:
        """Return the policy with these measurements added."""
        return dataclasses.replace(
            self,
            qualities={**self.qualities, **qualities},
            speeds={**self.speeds, **speeds},
        )

    def _depths(self, choice: DepthChoice, field: str) -> tuple[DepthPair, Reason]:
        match choice:
            case Layers(num_layers):
                layers = layers_of(num_layers, self.num_layers, f"{field}.layers")
                return DepthPair(layers, layers), Reason.REQUESTED
            case PruneRatio(ratio):
                layers = layers_of(ratio, self.num_layers, f"{field}.prune_ratio")
                return DepthPair(layers, layers), Reason.REQUESTED
            case NamedLevel(name):
                return self.level(name).depths, Reason.REQUESTED
            case Auto(max_quality_loss=loss):
                return self._auto(loss, f"{field}.auto.max_quality_loss")
            case None if self.auto_by_default:
                return self._auto(None, field)
            case None:
                return self.level(self.default_level).depths, Reason.DEFAULT

    def _check_depths(self, depths: DepthPair, depth: DepthChoice) -> None:
        """Raise :class:`InvalidArgument` for depths that a request may not have."""
        if self.can_have(depths):
            return
        if depths.prefill_layers != depths.decode_layers:
            allowed = f"{depths.decode_layers} layers, the request's depth: {_ONE_DEPTH}"
            raise InvalidArgument("prefill_depth", depths.prefill_layers, allowed)
        known = ", ".join(f"{level.decode_layers} ({level.name})" for level in self.levels)
        allowed = f"the depth of a level: {known}"
        if isinstance(depth, PruneRatio):
            allowed += f"; this ratio leaves {depths.decode_layers} layers"
            raise InvalidArgument("depth.prune_ratio", depth.ratio, allowed)
        raise InvalidArgument("depth.layers", depths.decode_layers, allowed)

    def _auto(self, max_quality_loss: float | None, field: str) -> tuple[DepthPair, Reason]:
        unloaded, present = (
            self._within(self.level(name).depths, max_quality_loss, field)
            for name in (self.auto_level, self.present_level)
        )
        return present, Reason.AUTO if present == unloaded else Reason.DEGRADED

    def _within(self, depths: DepthPair, max_quality_loss: float | None, field: str) -> DepthPair:
        """Return the depths, or deeper ones if these lose more than ``max_quality_loss``.

        The deeper ones are the shallowest that were measured to lose no more, at least as deep as
        the decode depth.
        """
        if max_quality_loss is None:
            return depths
        if not max_quality_loss >= 0:
            raise InvalidArgument(field, max_quality_loss, "0 or more")
        dense = self.qualities.get(self.dense)
        if dense is None:
            raise FailedPrecondition(
                f"{field}: got {max_quality_loss}, but the quality of the dense model has not "
                "been measured on this server; name a depth, or leave max_quality_loss out"
            )
        good = [
            pair
            for pair, quality in self.qualities.items()
            if quality.perplexity / dense.perplexity - 1 <= max_quality_loss
        ]
        if depths in good:
            return depths
        deeper = [
            pair
            for pair in good
            if pair.prefill_layers == pair.decode_layers >= depths.decode_layers
        ]
        return min(deeper, default=self.dense)
