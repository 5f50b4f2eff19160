"""The depth policy: plan, levels and measurements, and the depth that each request gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pruning.plan import Plan
from pruning.probes import Probes
from pruning.quality import Quality
from server.depth.depth_choice import (
    Auto,
    DepthChoice,
    Layers,
    NamedLevel,
    PruneRatio,
    RequestKind,
)
from server.depth.levels import DepthPair, Level, LevelSpec, check_levels, layers_of, spec_of
from server.depth.measured import Measured, Speed
from server.depth.repair import StandIn
from server.depth.served_depth import Reason, ServedDepth
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition, InvalidArgument, UnknownLevel

_ONE_DEPTH = "dedicated engines run the same layers for the prompt and for generated tokens"


def healable_layers(
    prefill_skips: tuple[int, ...], decode_skips: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the layers that one set of healed maps may stand in for; None: there is none.

    Healed maps belong to one set of skipped layers. So prompt and generated tokens must skip the
    same, or one of the two none; see :meth:`pruning.repair.Healing.serves`.
    """
    skipped = {prefill_skips, decode_skips} - {()}
    return skipped.pop() if len(skipped) == 1 else None


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
    # The levels of Auto at present, for requests that generate and for those that score;
    # auto_level is the level of both without load.
    present_level: str = ""
    present_score_level: str = ""
    # Whether requests that name no depth are served as Auto.
    auto_by_default: bool = False
    # Holds under this plan, and with the maps below.
    measured: Measured = field(default_factory=Measured)
    any_depth: bool = True
    # The fingerprint of the maps that stand in for skipped layers; None: nothing does.
    repair: str | None = None
    # By the layers that are skipped, the fingerprint of healed maps that stand in for them instead.
    healed: Mapping[tuple[int, ...], str] = field(default_factory=dict)
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
        object.__setattr__(self, "healed", MappingProxyType(dict(self.healed)))
        object.__setattr__(self, "default_level", self.default_level or self.levels[0].name)
        object.__setattr__(self, "auto_level", self.auto_level or self.default_level)
        for name in ("present_level", "present_score_level"):
            object.__setattr__(self, name, getattr(self, name) or self.auto_level)
        for name in (
            self.default_level,
            self.auto_level,
            self.present_level,
            self.present_score_level,
        ):
            self.level(name)

    @property
    def num_layers(self) -> int:
        return self.plan.num_layers

    @property
    def dense(self) -> DepthPair:
        return DepthPair(self.num_layers, self.num_layers)

    @property
    def qualities(self) -> Mapping[DepthPair, Quality]:
        return self.measured.qualities

    @property
    def speeds(self) -> Mapping[DepthPair, Speed]:
        return self.measured.speeds

    @property
    def probes(self) -> Mapping[DepthPair, Probes]:
        return self.measured.probes

    def can_have(self, depths: DepthPair) -> bool:
        """Return whether a request may run at these depths."""
        return self.any_depth or any(level.depths == depths for level in self.levels)

    def is_probed(self, depths: DepthPair, probes: Probes | None = None) -> bool:
        """Return whether there is nothing to gain from another probe of ``depths``.

        ``probes`` are what is known of them, by default what the policy has. What was measured
        without a dense model is measured again once there is one to compare with.
        """
        probes = self.probes.get(depths) if probes is None else probes
        return probes is not None and (probes.has_dense or not self.can_have(self.dense))

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
        prefill = tuple(sorted(self.plan.skipped(depths.prefill_layers)))
        decode = tuple(sorted(self.plan.skipped(depths.decode_layers)))
        repair = None if depths == self.dense else self.repair
        healable = healable_layers(prefill, decode)
        if healable is not None:
            repair = self.healed.get(healable, repair)
        return LayerSelection(prefill, decode, repair)

    def healable_levels(self) -> dict[tuple[int, ...], list[DepthPair]]:
        """Return the depths of levels by the layers that healed maps would stand in for there."""
        found: dict[tuple[int, ...], list[DepthPair]] = {}
        for depths in dict.fromkeys(level.depths for level in self.levels):
            layers = self.selection(depths)
            healable = healable_layers(layers.prefill_skips, layers.decode_skips)
            if healable is not None:
                found.setdefault(healable, []).append(depths)
        return found

    def stand_in(self, depths: DepthPair) -> StandIn:
        """Return what stands in for the layers that are skipped at these depths."""
        repair = self.selection(depths).repair
        if repair is None:
            return StandIn.NONE
        return StandIn.CLOSED_FORM if repair == self.repair else StandIn.HEALED

    @property
    def is_degraded(self) -> bool:
        """Whether load has turned down the depth of any requests with ``Auto``."""
        return {self.present_level, self.present_score_level} != {self.auto_level}

    def resolve(
        self,
        depth: DepthChoice,
        prefill_depth: DepthChoice = None,
        kind: RequestKind = RequestKind.GENERATE,
    ) -> tuple[LayerSelection, ServedDepth]:
        """Return the layers that a request skips, and the depth it is served at.

        A level sets both depths, unless ``prefill_depth`` is given. What ``Auto`` gets under load
        depends on the ``kind`` of request.

        Raises :class:`InvalidArgument`, naming the field, for a depth that the request cannot
        have, :class:`UnknownLevel` for a level that does not exist, and
        :class:`FailedPrecondition` if a quality is asked for and none has been measured.
        """
        depths, reason = self._depths(depth, "depth", kind)
        if prefill_depth is not None:
            prefill, _ = self._depths(prefill_depth, "prefill_depth", kind)
            depths = DepthPair(prefill.prefill_layers, depths.decode_layers)
        self._check_depths(depths, depth)
        served = ServedDepth(
            depths.prefill_layers, depths.decode_layers, reason, self.stand_in(depths)
        )
        return self.selection(depths), served

    def with_plan(self, plan: Plan) -> DepthPolicy:
        """Return the policy with another plan, whose quality has not been measured.

        The speeds stay: they depend on how many layers run, not on which.
        """
        return dataclasses.replace(self, plan=plan, measured=Measured(speeds=self.speeds))

    def with_repair(self, repair: str | None) -> DepthPolicy:
        """Return the policy with other maps for skipped layers, which has not been measured."""
        return dataclasses.replace(self, repair=repair, measured=Measured())

    def with_healed(self, skipped: tuple[int, ...], fingerprint: str) -> DepthPolicy:
        """Return the policy with these healed maps for the layers ``skipped``.

        Depths that they serve have not been measured.
        """
        return self._with_maps(healed={**self.healed, skipped: fingerprint})

    def without_maps(self, fingerprint: str) -> DepthPolicy:
        """Return the policy without the maps of this fingerprint.

        Depths that they served have not been measured.
        """
        return self._with_maps(
            repair=None if self.repair == fingerprint else self.repair,
            healed={k: v for k, v in self.healed.items() if v != fingerprint},
        )

    def _with_maps(self, **maps: Any) -> DepthPolicy:
        changed = dataclasses.replace(self, **maps)
        still_applies = self.measured.where(
            lambda pair: changed.selection(pair) == self.selection(pair)
        )
        return dataclasses.replace(changed, measured=still_applies)

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
        measured = self.measured
        if not self.any_depth:  # measurements of a removed level no longer apply to this server
            measured = measured.where({level.depths for level in levels}.__contains__)
        return dataclasses.replace(
            self,
            measured=measured,
            levels=levels,
            specs=specs,
            default_level=kept if default_level is None else default_level,
            auto_level=self.auto_level if self.auto_level in names else "",
            present_level="",
            present_score_level="",
        )

    def with_found(self, levels: tuple[Level, ...]) -> DepthPolicy:
        """Return the policy with the levels that were found for its ``specs``.

        Load goes on to count: the level of ``Auto`` at present stays if it still exists.
        """
        names = {level.name for level in levels}
        default, auto, present, present_score = (
            name if name in names else ""
            for name in (
                self.default_level,
                self.auto_level,
                self.present_level,
                self.present_score_level,
            )
        )
        return dataclasses.replace(
            self,
            levels=levels,
            default_level=default,
            auto_level=auto,
            present_level=present,
            present_score_level=present_score,
        )

    def with_auto_level(self, name: str) -> DepthPolicy:
        """Return the policy with another level of ``Auto`` without load."""
        self.level(name)
        return dataclasses.replace(self, auto_level=name, present_level="", present_score_level="")

    def with_present_level(self, name: str, score_level: str | None = None) -> DepthPolicy:
        """Return the policy with another level of ``Auto`` at present.

        ``score_level`` is that of requests that score; None: the same.
        """
        return dataclasses.replace(
            self, present_level=name, present_score_level=score_level or name
        )

    def with_auto_by_default(self, auto_by_default: bool) -> DepthPolicy:
        return dataclasses.replace(self, auto_by_default=auto_by_default)

    def with_measured(self, measured: Measured) -> DepthPolicy:
        """Return the policy with these measurements added."""
        return dataclasses.replace(self, measured=self.measured | measured)

    def _depths(
        self, choice: DepthChoice, field: str, kind: RequestKind
    ) -> tuple[DepthPair, Reason]:
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
                return self._auto(loss, f"{field}.auto.max_quality_loss", kind)
            case None if self.auto_by_default:
                return self._auto(None, field, kind)
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

    def _auto(
        self, max_quality_loss: float | None, field: str, kind: RequestKind
    ) -> tuple[DepthPair, Reason]:
        scores = kind is RequestKind.SCORE
        unloaded, present = (
            self._within(self.level(name).depths, max_quality_loss, field)
            for name in (
                self.auto_level,
                self.present_score_level if scores else self.present_level,
            )
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
