"""Attempts of a request, which may run again when the engine has died."""

from __future__ import annotations

import logging
from dataclasses import replace

from server.depth.repair import StandIn
from server.depth.served_depth import ServedDepth
from server.engine.base import Engine, EngineDead, LayerSelection, RepairsLayers
from server.errors import Unavailable
from server.serving.admission import Admitted
from server.serving.engine_restarter import EngineRestarter
from server.serving.fair_queue import Slot
from server.serving.service_state import ENGINE_DEAD

# If two engines have died with a request running, it may be the cause, so there is no third try.
_MAX_ATTEMPTS = 2

logger = logging.getLogger(__name__)


def without_lost_repair(
    engine: Engine, layers: LayerSelection, served: ServedDepth
) -> tuple[LayerSelection, ServedDepth]:
    """Return what a request can run as: without maps that the engine lost at its restart."""
    if (
        layers.repair is None
        or not isinstance(engine, RepairsLayers)
        or engine.has_repair(layers.repair)
    ):
        return layers, served
    return replace(layers, repair=None), replace(served, stand_in=StandIn.NONE)


class Attempts:
    """The attempts of one request: it may run again once, after the engine's death."""

    def __init__(
        self, restarter: EngineRestarter, slot: Slot, admitted: Admitted, *, may_repeat: bool
    ) -> None:
        """``may_repeat``: the client gets nothing of the answer before its end."""
        self._restarter = restarter
        self._slot = slot
        self._admitted = admitted
        self._may_repeat = may_repeat
        self._num_made = 0
        self._num_restarts = 0

    def begin(self) -> None:
        """Note that the request is about to be given to the engine."""
        self._num_made += 1
        self._num_restarts = self._restarter.num_restarts

    async def survive(self, error: EngineDead, *, has_begun: bool = False) -> None:
        """Wait for a slot in the engine once it has been started again.

        Raises :class:`Unavailable` if the request may not run again: ``has_begun`` says that a
        part of the answer was generated, or engines have died in all attempts. The log names the
        request in the latter case.
        """
        self._restarter.note_death(self._num_restarts)
        if self._num_made >= _MAX_ATTEMPTS:
            logger.error(
                "%s was running in %d engines when they died: it is the likely cause, and is not "
                "run again",
                self._admitted.title,
                self._num_made,
            )
        elif self._may_repeat and not has_begun:
            await self._slot.again()
            return
        raise Unavailable(ENGINE_DEAD) from error
