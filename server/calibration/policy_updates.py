"""Policies that are measured while another one is in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager

from pruning.plan import Plan
from server.calibration.calibrator import Calibrator, OnProgress, Progress
from server.depth.levels import LevelSpec, check_levels
from server.depth.policy import DepthPolicy
from server.engine.base import Engine
from server.errors import FailedPrecondition

logger = logging.getLogger(__name__)


class PolicyUpdates:
    """Measures a new plan or new levels, one update at a time, and puts them in force."""

    def __init__(
        self,
        engine: Engine,
        calibrator: Calibrator,
        *,
        present: Callable[[], DepthPolicy],
        install: Callable[[DepthPolicy], None],
        save: Callable[[DepthPolicy], None] | None,
        engine_errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Update the policy that ``present`` returns with ``install``.

        ``save`` is called, in a thread, with every policy that has been put in force.
        """
        self._engine = engine
        self._calibrator = calibrator
        self._present = present
        self._install = install
        self._save = save
        self._engine_errors = engine_errors
        self._updating = asyncio.Lock()

    @property
    def is_running(self) -> bool:
        return self._updating.locked()

    async def calibrate(
        self, texts: Sequence[str], max_tokens: int | None
    ) -> AsyncGenerator[Progress | Plan, None]:
        """See :meth:`server.serving.service.Service.calibrate`."""
        async with self._update():
            queue: asyncio.Queue[Progress | None] = asyncio.Queue()
            task = asyncio.create_task(self._calibrate(texts, max_tokens, queue.put_nowait))
            task.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (progress := await queue.get()) is not None:
                    yield progress
                yield await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def set_levels(
        self, specs: Sequence[LevelSpec], default_level: str | None
    ) -> DepthPolicy:
        """See :meth:`server.serving.service.Service.set_levels`."""
        num_layers = self._present().num_layers
        levels = check_levels(
            spec.resolve(num_layers, f"levels[{i}]") for i, spec in enumerate(specs)
        )
        self._present().with_levels(levels, default_level)  # refuses a default that does not exist
        async with self._update():
            policy = self._present().with_levels(levels, default_level)
            async with self._prepared(policy, lambda _: None):
                policy = await self._measured(policy, lambda _: None)
                # What SetPolicy changed meanwhile stays.
                self._install(
                    self._present()
                    .with_levels(levels, default_level)
                    .with_measurements(policy.qualities, policy.speeds)
                )
            await self._keep(self._present())
            return self._present()

    @asynccontextmanager
    async def _update(self) -> AsyncIterator[None]:
        if self._updating.locked():
            raise FailedPrecondition("another Calibrate or SetLevels is running")
        async with self._updating:
            yield

    async def _calibrate(
        self, texts: Sequence[str], max_tokens: int | None, on_progress: OnProgress
    ) -> Plan:
        with self._engine_errors():
            plan = await self._calibrator.measure_plan(on_progress, texts, max_tokens)
        policy = self._present().with_plan(plan)
        async with self._prepared(policy, on_progress):
            policy = await self._measured(policy, on_progress)
            # What SetPolicy changed meanwhile stays.
            self._install(
                self._present().with_plan(plan).with_measurements(policy.qualities, policy.speeds)
            )
        await self._keep(self._present())
        return plan

    @asynccontextmanager
    async def _prepared(self, policy: DepthPolicy, on_progress: OnProgress) -> AsyncIterator[None]:
        """Have the engine ready for ``policy``; afterwards, for the policy in force alone."""
        try:
            await self._engine.prepare(
                policy.plan,
                policy.level_selections(),
                lambda done, total: on_progress(Progress("levels", done, total)),
            )
            yield
        finally:
            self._engine.release_others(self._present().level_selections().values())

    async def _measured(self, policy: DepthPolicy, on_progress: OnProgress) -> DepthPolicy:
        """Return the policy with the quality and speed of those of its depths that lack them."""
        with self._engine_errors():
            wanted = self._calibrator.depths_to_measure(policy)
            qualities = await self._calibrator.measure_quality(
                policy, [pair for pair in wanted if pair not in policy.qualities], on_progress
            )
            speeds = await self._calibrator.measure_speed(
                policy,
                [level.depths for level in policy.levels if level.depths not in policy.speeds],
                on_progress,
            )
        return policy.with_measurements(qualities, speeds)

    async def _keep(self, policy: DepthPolicy) -> None:
        if self._save is not None:
            try:
                await asyncio.to_thread(self._save, policy)
            except OSError:
                logger.exception("the plan is in force, but could not be kept for the next start")
