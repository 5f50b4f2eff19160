"""Turns the depth down under load, and up again."""

from __future__ import annotations

import asyncio

from server.calibration.policy_in_force import PolicyInForce
from server.depth.autodepth import AutoDepth
from server.serving.fair_queue import FairQueue
from server.telemetry.metrics import Metrics

_INTERVAL_SECONDS = 0.5


class LoadFollower:
    """Installs the levels that :class:`AutoDepth` chooses for the load of the queue."""

    def __init__(
        self, auto: AutoDepth, queue: FairQueue, in_force: PolicyInForce, metrics: Metrics
    ) -> None:
        self._auto = auto
        self._queue = queue
        self._in_force = in_force
        self._metrics = metrics

    async def run(self) -> None:
        """Choose levels every half second, for ever. A policy must have been installed."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            rung = self._auto.rung
            policy = self._in_force.policy
            levels = self._auto.choose(
                policy,
                num_waiting=self._queue.num_waiting,
                longest_wait=self._queue.longest_wait(),
                utilization=self._queue.utilization,
            )
            names = levels.generate.name, levels.score.name
            if names != (policy.present_level, policy.present_score_level):
                self._in_force.install(policy.with_present_level(*names))
            if self._auto.rung != rung:
                self._metrics.count_policy_change(down=self._auto.rung > rung)
