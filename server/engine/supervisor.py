"""The supervisor of an engine: starts it again when it has died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class Startable(Protocol):
    """An engine that can die and be started again."""

    @property
    def is_alive(self) -> bool: ...

    async def start(self) -> None: ...


class Supervisor:
    """Watches the engine, and starts it again with exponential back-off.

    ``on_death`` is called when the engine is found dead, and returns whether to start it again.
    ``on_restart`` is called when it runs again, ``on_failure`` when a start has failed.
    """

    def __init__(
        self,
        engine: Startable,
        on_death: Callable[[], bool],
        on_restart: Callable[[], None],
        on_failure: Callable[[], None] = lambda: None,
        *,
        name: str = "the engine",
        poll_seconds: float = 1.0,
        first_delay: float = 0.5,
        max_delay: float = 30.0,
    ) -> None:
        self._engine = engine
        self._name = name
        self._on_death = on_death
        self._on_restart = on_restart
        self._on_failure = on_failure
        self._poll_seconds = poll_seconds
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._look = asyncio.Event()
        self._delay = first_delay

    def report_death(self) -> None:
        """Report that the engine is dead, so that it is not found so only at the next look."""
        self._look.set()

    async def run(self) -> None:
        """Watch until cancelled, or until ``on_death`` says that nothing is to be done."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            try:
                await asyncio.wait_for(self._look.wait(), self._poll_seconds)
            except TimeoutError:
                if self._engine.is_alive:
                    continue
            self._look.clear()
            if not self._on_death():
                return
            if loop.time() - started > self._max_delay:
                self._delay = self._first_delay
            await self._restart()
            started = loop.time()
            self._look.clear()
            self._on_restart()

    async def _restart(self) -> None:
        while True:
            # Doubled even if the start succeeds, because the engine may die again at once.
            delay, self._delay = self._delay, min(2 * self._delay, self._max_delay)
            logger.error("%s has died; it is started again in %g s", self._name, delay)
            await asyncio.sleep(delay)
            try:
                await self._engine.start()
            except Exception:
                logger.exception("%s could not be started again", self._name)
                self._on_failure()
            else:
                logger.info("%s runs again", self._name)
                return
