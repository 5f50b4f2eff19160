"""Measurements that a start has left: they are made while serving, in the gaps of load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from server.calibration.gaps import gate_at_gaps
from server.calibration.measuring_steps import Measurement, MeasuringSteps, Step
from server.calibration.policy_in_force import PolicyInForce
from server.depth.level_search import with_found_levels
from server.depth.policy import DepthPolicy
from server.engine.pace import measuring_after
from server.errors import FathomError, Unavailable

# A gap begins when nothing has run or waited for so long.
_CALM_SECONDS = 0.5
# How soon a measurement notices that it is in the way.
_POLL_SECONDS = 0.05
# Depths of one step. Quality needs a pass of the dense model besides, in every step.
_NUM_DEPTHS = 2
# A quality that was given up so often in a row is measured to the end, beside requests.
_MAX_INTERRUPTIONS = 3

logger = logging.getLogger(__name__)


class LateMeasurements:
    """Measures what the policy in force lacks, step by step, and installs what comes of it.

    A step begins only when no request runs or waits, and is given up when one comes; so requests
    are held up by no more than the engine's present step. Speed is measured in undisturbed gaps
    alone. What cannot be measured is left, and told of in :attr:`problems`.
    """

    def __init__(
        self,
        steps: MeasuringSteps,
        in_force: PolicyInForce,
        *,
        is_busy: Callable[[], bool],
        awaits_repair: Callable[[], bool],
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """``is_busy``: whether a measurement would be in the way, or could not be made.

        ``awaits_repair``: whether repair maps are being fitted, with which everything is measured
        anew.
        ``errors`` notes an engine's death, and turns it into :class:`Unavailable`.
        """
        self._steps = steps
        self._in_force = in_force
        self._is_busy = is_busy
        self._awaits_repair = awaits_repair
        self._errors = errors
        # What could not be measured, and why.
        self._given_up: dict[Measurement, str] = {}
        self._num_interruptions = 0

    @property
    def pending(self) -> list[str]:
        """What is still to be measured, in words."""
        measured = self._steps.pending(self._in_force.policy, self._given_up.keys())
        return ["repair", *measured] if self._awaits_repair() else measured

    @property
    def problems(self) -> list[str]:
        """What could not be measured, one sentence each."""
        return list(dict.fromkeys(self._given_up.values()))

    async def run(self) -> None:
        """Measure until nothing is left."""
        logger.info("to be measured while serving: %s", "; ".join(self.pending) or "nothing")
        while (step := self._next()) is not None or self._awaits_repair():
            await self._gap()
            # Else another policy has been put in force meanwhile.
            if step is not None and step == self._next():
                await self._take(step)
        logger.info("everything has been measured")

    def _next(self) -> Step | None:
        policy, given_up = self._in_force.policy, self._given_up.keys()
        step = self._steps.next(policy, num_depths=_NUM_DEPTHS, without=given_up)
        if step is None or step.phase != "speed" or self._num_interruptions < _MAX_INTERRUPTIONS:
            return step
        # There are no gaps that are long enough for it now.
        untimed: set[Measurement] = {("speed", level.depths) for level in policy.levels}
        untimed.add(("speed", policy.dense))
        others = self._steps.next(policy, num_depths=_NUM_DEPTHS, without=given_up | untimed)
        return others or step

    async def _gap(self) -> None:
        """Return when nothing has run or waited for a while."""
        calm = 0.0
        while calm < _CALM_SECONDS:
            await asyncio.sleep(_POLL_SECONDS)
            in_the_way = self._is_busy() or self._awaits_repair()
            calm = 0.0 if in_the_way else calm + _POLL_SECONDS

    async def _take(self, step: Step) -> None:
        policy = self._in_force.policy
        try:
            with self._errors():
                measured = await self._undisturbed(policy, step)
        except Unavailable:
            return  # the engine is being started again
        except (FathomError, OSError) as error:
            depths = ", ".join(str(pair.decode_layers) for pair in step.depths)
            problem = f"the {step.phase} of depth {depths} could not be measured: {error}"
            logger.error("%s", problem)
            self._given_up |= {(step.phase, pair): problem for pair in step.depths}
            return
        if measured is None:
            logger.debug("a measurement of %s has made way for a request", step.phase)
            self._num_interruptions += 1
            return
        self._num_interruptions = 0
        self._install(policy, measured)

    async def _undisturbed(self, policy: DepthPolicy, step: Step) -> DepthPolicy | None:
        """Return the policy with what the step measures; None where it was in the way."""
        is_patient = step.phase != "speed" and self._num_interruptions >= _MAX_INTERRUPTIONS
        # A measurement that is made to the end gives way to requests, too, one part at a time.
        with measuring_after(gate_at_gaps(self._is_busy)):
            task = asyncio.create_task(self._steps.take(policy, step))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_SECONDS)
                if not task.done() and not is_patient and self._is_busy():
                    return None
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _install(self, before: DepthPolicy, measured: DepthPolicy) -> None:
        """Put what was measured in force, unless it was measured of another plan or other maps."""
        present = self._in_force.policy
        if (present.plan, present.repair, present.healed) != (
            before.plan,
            before.repair,
            before.healed,
        ):
            return
        possible = measured.measured.where(present.can_have)
        policy = with_found_levels(present.with_measured(possible))
        self._in_force.install(policy)
        if policy.levels != present.levels:
            logger.info(
                "levels, now that they have been measured: %s", ", ".join(map(str, policy.levels))
            )
