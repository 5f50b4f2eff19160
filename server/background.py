"""Work that goes on beside requests, and is started again where it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class BackgroundTask:
    """Runs ``work`` until it returns or :meth:`stop` is called.

    An exception that it raises is logged as critical, with its traceback, and it is started
    again: after ``first_delay`` seconds, then after twice as many each time, ``max_delay`` at
    most, and after ``first_delay`` again once it has run for longer than ``max_delay``.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, None]],
        *,
        first_delay: float = 1.0,
        max_delay: float = 60.0,
    ) -> None:
        """``name`` is what the log calls it, such as "the watchdog"."""
        self._name = name
        self._work = work
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        assert self._task is None, f"{self._name} has been started before"
        self._task = asyncio.create_task(self._run(), name=self._name)

    def cancel(self) -> None:
        """Ask it to end, without waiting for that."""
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """End it, and return when it has ended."""
        self.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        delay = self._first_delay
        while True:
            started = loop.time()
            try:
                await self._work()
                return
            except asyncio.CancelledError as error:
                if self._is_stopping():
                    raise
                problem: BaseException = error  # of something that it waited for
            except Exception as error:
                if self._is_stopping():
                    logger.warning("%s has failed as it was stopped", self._name, exc_info=error)
                    return
                problem = error
            if loop.time() - started > self._max_delay:
                delay = self._first_delay
            logger.critical(
                "%s has died; it is started again in %g s", self._name, delay, exc_info=problem
            )
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._max_delay)

    def _is_stopping(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
