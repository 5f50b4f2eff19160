"""Healing of the levels in use, beside the engine that serves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from pruning.repair import HealingStep, RepairError
from pruning.repair.healing_job import HealingJob
from server.calibration.healed_store import HEALED_NAMES, HealedStore, Outcome, Training
from server.calibration.healing import HealedLevels
from server.calibration.healing_process import heal_beside
from server.engine.base import EngineDead
from server.errors import Unavailable
from server.serving.service import Service
from server.serving.service_state import State

# Times that an engine may die while the result of a training is measured in it.
_MAX_TRIES = 3

logger = logging.getLogger(__name__)

# Returns the training for these skipped layers, with the file that it writes its result to and the
# one that keeps its state.
JobOf = Callable[[tuple[int, ...], Path, Path], HealingJob]


class LevelHealer:
    """Trains maps or gated MLPs for the levels in use, one set of skipped layers after the other.

    What is better on held-out text is put in force and kept.
    """

    def __init__(
        self,
        service: Service,
        levels: HealedLevels,
        store: HealedStore,
        training: Training,
        job_of: JobOf,
    ) -> None:
        self._service = service
        self._levels = levels
        self._store = store
        self._training = training
        self._job_of = job_of

    async def run(self) -> None:
        """Heal every set of layers that a level skips; a set that cannot be healed is logged."""
        tried: set[tuple[int, ...]] = set()
        while True:
            await self._serving()
            in_use = self._service.policy.healable_levels()
            skipped = next((each for each in in_use if each not in tried), None)
            if skipped is None:
                return
            tried.add(skipped)
            name = self._levels.name(self._service.policy, skipped)
            try:
                await self._heal(skipped, name)
            except (RepairError, OSError) as error:
                logger.warning("healing for %s has failed: %s", name, error)

    async def _heal(self, skipped: tuple[int, ...], name: str) -> None:
        what = HEALED_NAMES[self._training.kind]
        outcome = self._store.outcome(skipped, self._training)
        if outcome is not None:
            came_to = outcome.problem or f"the {what} are kept"
            logger.info("healing for %s was done before: %s", name, came_to)
            return
        trained = self._store.candidate(skipped, self._training)
        if trained is None:
            trained = await self._trained(skipped, name)
        problem = await self._installed(skipped, trained)
        if problem is None:
            logger.info("%s of %s are not used: no level skips these layers now", what, name)
            return
        if problem:
            logger.warning("%s of %s are not used: %s", what, name, problem)
        else:
            logger.info("%s of %s are in force", what, name)
        self._store.save_outcome(skipped, self._training, Outcome(problem))
        trained.unlink(missing_ok=True)

    async def _trained(self, skipped: tuple[int, ...], name: str) -> Path:
        def on_step(step: HealingStep) -> None:
            if step.held_out_loss is not None:
                logger.info(
                    "healing for %s: %d of %d steps, %.3f nats from the dense model",
                    name,
                    step.step,
                    step.num_steps,
                    step.held_out_loss,
                )

        out = self._store.candidate_of(skipped, self._training)
        checkpoint = self._store.checkpoint_of(skipped, self._training)
        await heal_beside(self._job_of(skipped, out, checkpoint), on_step)
        return out

    async def _installed(self, skipped: tuple[int, ...], trained: Path) -> str | None:
        """Return what is not better with what was trained, empty where it is in force now.

        None: no level skips the layers any more.
        """
        for tries_left in reversed(range(_MAX_TRIES)):
            await self._serving()
            try:
                with self._service.updating() as updates:
                    return await updates.take_healed(self._levels, skipped, trained, self._store)
            except (EngineDead, Unavailable) as error:
                if not tries_left:
                    raise RepairError(f"the engine has died while measuring: {error}") from error
        raise AssertionError("one of the tries has returned or raised")

    async def _serving(self) -> None:
        """Return when the service serves."""
        while (state := self._service.state) is not State.SERVING:
            await self._service.state_after(state)
