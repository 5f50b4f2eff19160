"""The measurements of a policy, one step after the other, the most useful first."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Literal

from server.calibration.calibrator import Calibrator, OnProgress
from server.calibration.measurements import Measurements
from server.calibration.policy_store import PolicyStore
from server.depth.level_search import search_levels, with_found_levels
from server.depth.levels import DepthPair
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy

# All depths of models with no more layers are measured at once: to search among them would take
# about as long.
_MAX_LAYERS_AT_ONCE = 16


Phase = Literal["quality", "probes", "speed"]

# What is measured, at which depths.
Measurement = tuple[Phase, DepthPair]


@dataclass(frozen=True, slots=True)
class Step:
    """What is measured in one go.

    ``can_wait`` is true of what no level that has been asked for needs.
    """

    phase: Phase
    depths: tuple[DepthPair, ...]
    can_wait: bool = False


class MeasuringSteps:
    """Says what a policy lacks, and measures it.

    First comes the quality of dense and of the levels, among them those that are searched for by
    their quality; then how depths write and choose that levels are searched for at by that; then
    the levels' speed; then what can wait: how the levels write and choose, the search for optional
    levels of the prompt, and quality at every other depth, if that is wanted.
    """

    def __init__(
        self, calibrator: Calibrator, store: PolicyStore | None, on_progress: OnProgress
    ) -> None:
        """``store`` is asked before anything is measured, and keeps what was."""
        self._calibrator = calibrator
        self._measurements = Measurements(calibrator, store, on_progress)

    def next(
        self,
        policy: DepthPolicy,
        *,
        num_depths: int | None = None,
        without: Set[Measurement] = frozenset(),
    ) -> Step | None:
        """Return the next step; None where nothing is left, measurements ``without`` apart.

        At most ``num_depths`` are measured in one step; None: all that can be. Speed is always
        measured at all levels together, which makes it comparable.
        """
        for step in self._steps(policy):
            depths = [pair for pair in step.depths if (step.phase, pair) not in without]
            if depths:
                most = None if step.phase == "speed" else num_depths
                return replace(step, depths=tuple(depths[:most]))
        return None

    async def take(self, policy: DepthPolicy, step: Step) -> DepthPolicy:
        """Return the policy with what the step measures, and with the levels that follow."""
        if step.phase == "speed":
            speeds = await self._measurements.speeds(policy, step.depths)
            return policy.with_measured(Measured(speeds=speeds))
        if step.phase == "probes":
            probes = await self._measurements.probes(policy, step.depths)
            return with_found_levels(policy.with_measured(Measured(probes=probes)))
        qualities = await self._measurements.qualities(policy, step.depths)
        return with_found_levels(policy.with_measured(Measured(qualities)))

    async def take_all(self, policy: DepthPolicy) -> DepthPolicy:
        """Return the policy with everything measured, and with the levels that follow."""
        policy = with_found_levels(policy)
        while (step := self.next(policy)) is not None:
            policy = await self.take(policy, step)
        return policy

    async def take_levels(self, policy: DepthPolicy) -> DepthPolicy:
        """Return the policy with all quality measured, and with the levels that follow.

        Of probes and speed, no more is measured than levels follow from.
        """
        policy = with_found_levels(policy)
        while True:
            phases = {"quality", "probes"} if search_levels(policy).missing_probes else {"quality"}
            steps = (step for step in self._steps(policy) if step.phase in phases)
            if (step := next(steps, None)) is None:
                return policy
            policy = await self.take(policy, step)

    def pending(self, policy: DepthPolicy, without: Set[Measurement] = frozenset()) -> list[str]:
        """Return what is still to be measured, in words."""
        names = {level.depths: level.name for level in policy.levels}
        shown = set(self._calibrator.depths_to_measure(policy))
        missing: dict[str, list[DepthPair]] = {"speed": [], "probes": [], "quality": []}
        for step in self._steps(policy):
            missing[step.phase] += [
                pair for pair in step.depths if pair in shown and (step.phase, pair) not in without
            ]
        words = []
        if self.next(policy, without=without) is not None:
            words += [f"level {name}" for name in search_levels(policy).pending]
        for phase, pairs in missing.items():
            if pairs:
                pairs.sort(key=lambda pair: (-pair.decode_layers, -pair.prefill_layers))
                depths = [names.get(pair, f"depth {pair.decode_layers}") for pair in pairs]
                words.append(f"{phase} of {', '.join(depths)}")
        return words

    def _steps(self, policy: DepthPolicy) -> Iterator[Step]:
        calibrator = self._calibrator
        search = search_levels(policy)
        levels = calibrator.depths_to_time(policy)
        every = calibrator.depths_to_measure(policy)
        needed = _missing([*levels, *search.missing], policy.qualities)
        if needed:
            if policy.num_layers <= _MAX_LAYERS_AT_ONCE:
                needed = _missing([*needed, *every], policy.qualities)
            yield Step("quality", needed)
        if probes := _unprobed(policy, search.missing_probes):
            yield Step("probes", probes)
        if untimed := _missing(levels, policy.speeds):
            yield Step("speed", untimed)
        if probes := _unprobed(policy, levels):
            yield Step("probes", probes, can_wait=True)
        if prompts := _missing(search.missing_that_can_wait, policy.qualities):
            yield Step("quality", prompts, can_wait=True)
        if others := _missing(every, {*policy.qualities, *needed}):
            yield Step("quality", others, can_wait=True)


def _unprobed(policy: DepthPolicy, depths: Iterable[DepthPair]) -> tuple[DepthPair, ...]:
    return tuple(pair for pair in dict.fromkeys(depths) if not policy.is_probed(pair))


def _missing(depths: Iterable[DepthPair], measured: Container[DepthPair]) -> tuple[DepthPair, ...]:
    return tuple(pair for pair in dict.fromkeys(depths) if pair not in measured)
