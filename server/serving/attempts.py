"""How often a request may run when engines die under it."""

from __future__ import annotations

import logging

from server.engine.base import EngineDead
from server.errors import Unavailable
from server.serving.admission import Admitted
from server.serving.engine_restarter import EngineRestarter
from server.serving.fair_queue import Slot
from server.serving.service_state import ENGINE_DEAD

# Two engines that died may have died of this request; a third is not given to it.
_MAX_ATTEMPTS = 2

logger = logging.getLogger(__name__)


class Attempts:
    """The attempts of one request: after an engine's death it may get another one, once."""

    def __init__(
        self, restarter: EngineRestarter, slot: Slot, admitted: Admitted, *, may_repeat: bool
    ) -> None:
        """``may_repeat``: nothing of the answer reaches the client before its end."""
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
        """Wait for another slot in the engine that follows the dead one.

        ``has_begun``: something of the answer is lost. Raises :class:`Unavailable` then, and
        where the request has failed as often as it may; the log names it in that case.
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
