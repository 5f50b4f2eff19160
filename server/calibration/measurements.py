"""Measurements of depths: those that are kept, and those that are made now."""

from __future__ import annotations

from collections.abc import Sequence

from pruning.probes import Probes
from pruning.quality import Quality
from server.calibration.calibrator import Calibrator, OnProgress
from server.calibration.policy_store import PolicyStore
from server.depth.levels import DepthPair
from server.depth.measured import Speed
from server.depth.policy import DepthPolicy


class Measurements:
    """Measures depths under a policy, unless that is kept; its methods raise what both raise."""

    def __init__(
        self, calibrator: Calibrator, store: PolicyStore | None, on_progress: OnProgress
    ) -> None:
        """``store`` is asked before anything is measured, and keeps what was."""
        self._calibrator = calibrator
        self._store = store
        self._on_progress = on_progress

    async def qualities(
        self, policy: DepthPolicy, depths: Sequence[DepthPair]
    ) -> dict[DepthPair, Quality]:
        async def measure(missing: Sequence[DepthPair]) -> dict[DepthPair, Quality]:
            return await self._calibrator.measure_quality(policy, missing, self._on_progress)

        if self._store is None:
            return await measure(depths)
        return await self._store.qualities(policy, depths, measure)

    async def probes(
        self, policy: DepthPolicy, depths: Sequence[DepthPair]
    ) -> dict[DepthPair, Probes]:
        async def measure(missing: Sequence[DepthPair]) -> dict[DepthPair, Probes]:
            return await self._calibrator.measure_probes(policy, missing, self._on_progress)

        if self._store is None:
            return await measure(depths)
        return await self._store.probes(policy, depths, measure)

    async def speeds(
        self, policy: DepthPolicy, depths: Sequence[DepthPair]
    ) -> dict[DepthPair, Speed]:
        async def measure(missing: Sequence[DepthPair]) -> dict[DepthPair, Speed]:
            return await self._calibrator.measure_speed(policy, missing, self._on_progress)

        if self._store is None:
            return await measure(depths)
        return await self._store.speeds(policy, depths, measure)
