"""Repair of one model: fits the maps, installs them, and judges whether they help."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruning.repair import summarize_maps
from server.calibration.calibrator import Calibrator, OnProgress
from server.calibration.measurements import Measurements
from server.calibration.policy_store import PolicyStore
from server.depth.level_search import compared_depths
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.depth.repair import Repair, RepairStatus, StandIn
from server.engine.base import RepairsLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstalledRepair:
    """Maps that the engine has, and the file that they are in."""

    path: Path
    repair: Repair


class Repairer:
    """Has maps stand in for the layers that ``engine`` skips, where that helps.

    Its methods raise :class:`EngineDead`, and what :class:`Calibrator` raises.
    """

    def __init__(
        self,
        engine: RepairsLayers,
        calibrator: Calibrator,
        store: PolicyStore,
        on_progress: OnProgress,
        *,
        wanted: StandIn = StandIn.CLOSED_FORM,
    ) -> None:
        """``wanted`` is what the settings ask for."""
        self._engine = engine
        self._calibrator = calibrator
        self._store = store
        self._on_progress = on_progress
        self._measured = Measurements(calibrator, store, on_progress)
        self._wanted = wanted

    async def install(self) -> InstalledRepair:
        """Install the maps that are kept, or else those that are fitted now.

        Raises :class:`pruning.repair.RepairError` where they cannot be fitted, and
        :class:`OSError` where their file cannot be written or read.
        """

        async def fit(path: Path) -> None:
            await self._calibrator.fit_repair(self._engine, path, self._on_progress)

        return await self._installed(await self._store.repair(fit))

    async def install_kept(self) -> InstalledRepair | None:
        """Install the maps that are kept; return None where there are none.

        Raises what :meth:`install` does.
        """
        path = await self._store.kept_repair()
        return None if path is None else await self._installed(path)

    @property
    def wanted(self) -> StandIn:
        """What the settings ask for."""
        return self._wanted

    async def _installed(self, path: Path) -> InstalledRepair:
        fingerprint = await self._engine.install_repair(path)
        summary = await asyncio.to_thread(summarize_maps, path)
        return InstalledRepair(
            path,
            Repair(fingerprint, summary.num_bytes, summary.num_tokens, summary.unexplained),
        )

    async def judged(self, policy: DepthPolicy, repair: Repair) -> tuple[DepthPolicy, RepairStatus]:
        """Return the policy with ``repair``, if its levels come closer to the dense model by it.

        ``policy`` is one without.
        """
        repaired = policy.with_repair(repair.fingerprint)
        pruned = compared_depths(policy.specs, policy.num_layers)
        if not pruned:
            return repaired, RepairStatus(self._wanted, repair)
        without, with_repair = [await self._loss(of, pruned) for of in (policy, repaired)]
        compared = (
            f"the levels are {with_repair:.3f} nats from the dense model with it, "
            f"{without:.3f} without"
        )
        if with_repair >= without:
            problem = f"repair is not used: {compared}"
            logger.warning("%s", problem)
            status = RepairStatus(
                self._wanted,
                problem=problem,
                kl_nats=with_repair,
                kl_nats_without=without,
            )
            return policy, status
        logger.info("repair: %s", compared)
        status = RepairStatus(self._wanted, repair, kl_nats=with_repair, kl_nats_without=without)
        return repaired, status

    async def _loss(self, policy: DepthPolicy, depths: Sequence[DepthPair]) -> float:
        """Return the mean divergence from the dense model at ``depths``, in nats a token."""
        qualities = await self._measured.qualities(policy, depths)
        return math.fsum(
            math.inf if quality.kl_nats is None else quality.kl_nats
            for quality in qualities.values()
        ) / max(len(qualities), 1)
