"""Repair that comes while serving: at the first start, and when an engine has lost its maps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from pruning.repair import RepairError
from server.background import BackgroundTask
from server.calibration.gaps import gate_at_gaps
from server.calibration.policy_in_force import PolicyInForce
from server.calibration.policy_store import PolicyStore
from server.calibration.policy_updates import PolicyUpdates
from server.calibration.repairer import Repairer
from server.depth.policy import DepthPolicy
from server.engine.base import Engine, EngineDead, RepairsLayers
from server.engine.pace import measuring_after
from server.errors import FathomError

_LOST = (
    "the engine was started again, but its repair maps could not be loaded; layers are skipped "
    "without them until they have been fitted again"
)

logger = logging.getLogger(__name__)


class RepairRenewal:
    """Fits repair maps while the server serves, and puts them in force.

    It takes repair out of force when the engine has lost its maps, which were damaged when it was
    started again, and brings it back. Nothing that was measured with the lost maps is used
    meanwhile. Belongs to the thread of the event loop.
    """

    def __init__(
        self, engine: Engine, in_force: PolicyInForce, *, is_busy: Callable[[], bool]
    ) -> None:
        """``is_busy``: whether requests would have to wait for a measurement."""
        self._engine = engine
        self._in_force = in_force
        self._is_busy = is_busy
        self._store: PolicyStore | None = None
        self._updates: PolicyUpdates | None = None
        self._repairer: Repairer | None = None
        # Whether what a policy lacks is measured in any case.
        self._is_measured_on = False
        # Whether there are no maps: after a failure, the next start of the engine calls for them.
        self._is_missing = False
        self._is_fitting = False
        self._is_needed = asyncio.Event()

    @property
    def is_pending(self) -> bool:
        """Whether maps are to be fitted, or are fitted now."""
        return self._is_fitting or self._is_needed.is_set()

    def open(
        self,
        updates: PolicyUpdates,
        store: PolicyStore | None,
        repairer: Repairer | None,
        *,
        fits_now: bool = False,
    ) -> None:
        """Renew with ``repairer`` from now on, one at a time with ``updates``.

        ``fits_now``: there have been no maps before, and they are to be fitted.
        """
        self._updates, self._store, self._repairer = updates, store, repairer
        if fits_now:
            self._is_missing = self._is_measured_on = True
            self._is_needed.set()

    def task(self) -> BackgroundTask:
        """Return what is to run as long as the service is open."""
        return BackgroundTask("the renewal of repair", self._run)

    def engine_restarted(self) -> None:
        """See whether the engine still has its maps; to be called before it gets requests.

        Healed maps and MLPs that it has lost are out of force until the next start.
        """
        self._drop_healed()
        policy = self._in_force.policy
        if policy.repair is None:
            if self._is_missing:  # the engine has died while they were fitted
                self._is_needed.set()
            return
        engine = self._engine
        assert isinstance(engine, RepairsLayers), "it has repaired layers before"
        if engine.has_repair(policy.repair):
            return
        logger.error("%s", _LOST)
        self._is_missing = True
        self._in_force.install(self._unrepaired(policy))
        self._in_force.set_repair(replace(self._in_force.repair, in_force=None, problem=_LOST))
        self._is_needed.set()

    def _drop_healed(self) -> None:
        policy, engine = self._in_force.policy, self._engine
        if not policy.healed:
            return
        assert isinstance(engine, RepairsLayers), "it has healed layers before"
        lost = [maps for maps in policy.healed.values() if not engine.has_repair(maps)]
        for maps in lost:
            logger.error("healed maps or MLPs could not be loaded again: levels are served without")
            policy = policy.without_maps(maps)
        if lost:
            self._in_force.install(policy)

    def _unrepaired(self, policy: DepthPolicy) -> DepthPolicy:
        """Return the policy without repair, with what was once measured of it."""
        unrepaired = policy.with_repair(None)
        if self._store is None:
            return unrepaired
        return unrepaired.with_measured(self._store.kept(unrepaired, list(policy.qualities)))

    async def _run(self) -> None:
        while True:
            await self._is_needed.wait()
            self._is_needed.clear()
            if self._updates is None or self._repairer is None or not self._is_missing:
                continue
            self._is_fitting = True
            try:
                with measuring_after(gate_at_gaps(self._is_busy)):
                    await self._updates.renew_repair(
                        self._repairer, leaves_probes=self._is_measured_on
                    )
            except EngineDead:
                continue  # its restart calls for another attempt, so this is not the end
            except (RepairError, FathomError, OSError) as error:
                problem = f"repair is not used: its maps could not be fitted: {error}"
                logger.error("%s", problem)
                self._in_force.set_repair(replace(self._in_force.repair, problem=problem))
            else:
                self._is_missing = False
            self._is_fitting = self._is_measured_on = False
