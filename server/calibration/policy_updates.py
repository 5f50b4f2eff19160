"""Changes of the depth policy that are measured while another one is in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from pruning.plan import Plan
from server.calibration.calibrator import Calibrator, OnProgress, Progress
from server.calibration.healed_store import HealedStore
from server.calibration.healing import HealedLevels
from server.calibration.measuring_steps import MeasuringSteps
from server.calibration.policy_in_force import PolicyInForce
from server.calibration.policy_store import PolicyStore
from server.calibration.repairer import Repairer
from server.depth.level_search import compared_depths, with_found_levels
from server.depth.levels import LevelSpec, check_levels
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from server.engine.base import Engine
from server.errors import FailedPrecondition

logger = logging.getLogger(__name__)


class PolicyUpdates:
    """Measures a new plan or new levels, one update at a time, and puts them in force.

    Where levels have engines of their own, those that an update needs are started beside the
    present ones, which end with their last request.
    """

    def __init__(
        self,
        engine: Engine,
        calibrator: Calibrator,
        in_force: PolicyInForce,
        store: PolicyStore | None = None,
    ) -> None:
        """Update the policy of ``in_force``, and keep it in ``store`` for the next start."""
        self._engine = engine
        self._calibrator = calibrator
        self._in_force = in_force
        self._store = store
        self._updating = asyncio.Lock()
        self._is_renewing = False

    @property
    def is_running(self) -> bool:
        """Whether another policy is being measured."""
        return self._updating.locked()

    async def calibrate(
        self,
        texts: Sequence[str] = (),
        max_tokens: int | None = None,
        metric: str | None = None,
    ) -> AsyncGenerator[Progress | Plan, None]:
        """Rank the layers anew and measure the levels; yield progress, then the plan in force.

        ``metric`` is what they are ranked by; None: what the settings say. Closing the iterator
        before the plan came leaves everything as it was. Raises :class:`InvalidArgument` for
        texts that cannot be measured on and for an unknown metric, :class:`EngineDead` where the
        engine dies, and :class:`FailedPrecondition` while another measurement runs, for a search
        that the engine cannot do, and where there is not the memory for the engines of the new
        plan beside the present ones.
        """
        async with self._update():
            queue: asyncio.Queue[Progress | None] = asyncio.Queue()
            task = asyncio.create_task(self._calibrate(texts, max_tokens, metric, queue.put_nowait))
            task.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (progress := await queue.get()) is not None:
                    yield progress
                yield await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def set_levels(
        self, specs: Sequence[LevelSpec], default_level: str | None = None
    ) -> DepthPolicy:
        """Measure the levels that are new, then replace all levels at once.

        Raises :class:`InvalidArgument`, naming ``levels[i]``, :class:`EngineDead` where the
        engine dies, and :class:`FailedPrecondition` while another measurement runs and where a
        level's engine cannot be started; nothing is replaced then.
        """
        num_layers = self._in_force.policy.num_layers
        levels = check_levels(
            spec.resolve(num_layers, f"levels[{i}]") for i, spec in enumerate(specs)
        )
        if not self._in_force.policy.any_depth:
            for i, spec in enumerate(specs):
                spec.refuse_search(f"levels[{i}]")
        self._calibrator.check_limits(specs, (f"levels[{i}]" for i in range(len(specs))))
        asked = tuple(specs)
        # A default that does not exist is refused before anything is measured.
        self._in_force.policy.with_levels(levels, default_level, asked)
        async with self._update():
            policy = self._in_force.policy.with_levels(levels, default_level, asked)
            async with self._prepared(policy, lambda _: None):
                policy = await self._measured(policy, lambda _: None)
                self._check_repair(policy)
                # SetPolicy may have changed the policy meanwhile; its changes stay.
                present = self._in_force.policy.with_levels(policy.levels, default_level, asked)
                self._in_force.install(present.with_measured(policy.measured))
            await self._keep()
            return self._in_force.policy

    async def renew_repair(self, repairer: Repairer, *, leaves_probes: bool) -> None:
        """Fit repair maps and install them, and put them in force if they help.

        Levels that are searched for have been found with the maps then. ``leaves_probes``: their
        probes and speed will be measured later. Waits for another measurement to end. Raises what
        :class:`Repairer` raises, and :class:`EngineDead`; nothing is changed then.
        """
        async with self._updating:
            self._is_renewing = True
            try:
                await self._renew_repair(repairer, leaves_probes)
            finally:
                self._is_renewing = False

    async def take_healed(
        self, levels: HealedLevels, skipped: tuple[int, ...], trained: Path, store: HealedStore
    ) -> str | None:
        """Put the healed maps or MLPs in the file ``trained`` in force, where they are better.

        They are kept in ``store`` then. Returns what is not better; None: no level skips the
        layers ``skipped``. Waits for another measurement. Raises :class:`RepairError` and
        :class:`OSError` for a file that cannot be loaded or kept, and :class:`EngineDead`.
        """
        async with self._updating:
            policy = self._in_force.policy
            if skipped not in policy.healable_levels():
                return None
            found = await levels.judge(policy, skipped, trained, lambda _: None)
            if found.problem:
                return found.problem
            await levels.install(await asyncio.to_thread(store.keep, skipped, trained))
            policy = await self._measured(found.policy, lambda _: None)
            present = self._in_force.policy.with_healed(skipped, found.fingerprint)
            self._install(present, policy.measured)
            await self._keep()
            return ""

    @asynccontextmanager
    async def _update(self) -> AsyncIterator[None]:
        if self._updating.locked():
            running = "a fit of repair" if self._is_renewing else "another Calibrate or SetLevels"
            raise FailedPrecondition(f"{running} is running")
        async with self._updating:
            yield

    async def _calibrate(
        self,
        texts: Sequence[str],
        max_tokens: int | None,
        metric: str | None,
        on_progress: OnProgress,
    ) -> Plan:
        plan = await self._calibrator.measure_plan(
            on_progress,
            texts,
            max_tokens,
            metric,
            repair=self._in_force.policy.repair,
            depths=compared_depths(self._in_force.policy.specs, self._in_force.policy.num_layers),
        )
        policy = with_found_levels(self._in_force.policy.with_plan(plan))
        async with self._prepared(policy, on_progress):
            policy = await self._measured(policy, on_progress)
            self._check_repair(policy)
            self._install(self._in_force.policy.with_plan(plan), policy.measured)
        await self._keep()
        return plan

    async def _renew_repair(self, repairer: Repairer, leaves_probes: bool) -> None:
        installed = await repairer.install()
        # Levels with healed maps would be the same with and without.
        unhealed = replace(self._in_force.policy, healed={})
        policy, status = await repairer.judged(unhealed, installed.repair)
        if status.in_force is not None:
            steps = MeasuringSteps(self._calibrator, self._store, lambda _: None)
            measure = steps.take_levels if leaves_probes else steps.take_all
            policy = await measure(self._in_force.policy.with_repair(policy.repair))
            self._install(self._in_force.policy.with_repair(policy.repair), policy.measured)
        self._in_force.set_repair(status)
        await self._keep()

    def _install(self, present: DepthPolicy, measured: Measured) -> None:
        """Put ``present`` in force with what was measured, and with the levels that follow.

        It is made of the policy in force, not of the one that was measured: SetPolicy may have
        changed it meanwhile, and its changes stay.
        """
        self._in_force.install(with_found_levels(present.with_measured(measured)))

    @asynccontextmanager
    async def _prepared(self, policy: DepthPolicy, on_progress: OnProgress) -> AsyncIterator[None]:
        """Have the engine ready for ``policy``; afterwards, for the policy in force alone."""
        try:
            await self._calibrator.prepare(policy, on_progress)
            yield
        finally:
            self._engine.release_others(self._in_force.policy.level_selections().values())

    def _check_repair(self, policy: DepthPolicy) -> None:
        """Refuse measurements of a policy whose repair is no longer in force."""
        if policy.repair != self._in_force.policy.repair:
            raise FailedPrecondition(
                "the engine has lost its repair maps while this was measured; try again"
            )

    async def _measured(self, policy: DepthPolicy, on_progress: OnProgress) -> DepthPolicy:
        """Return the policy with what its depths lack of quality, probes and speed.

        Its levels are those that follow from their quality.
        """
        return await MeasuringSteps(self._calibrator, None, on_progress).take_all(policy)

    async def _keep(self) -> None:
        if self._store is not None:
            try:
                await asyncio.to_thread(self._store.save, self._in_force.policy)
            except OSError:
                logger.exception("the plan is in force, but could not be kept for the next start")
