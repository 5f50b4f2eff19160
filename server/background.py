"""Background tasks, which are started again when they fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class BackgroundTask:
    """Runs ``work`` until it returns or :meth:`stop` is called.

    An exception that ``work`` raises is logged as critical, with its traceback, and ``work`` is
    started again after ``first_delay`` seconds. The delay doubles each time, up to ``max_delay``,
    and is ``first_delay`` again once ``work`` has run for longer than ``max_delay``.
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
        """Start the task; needs a running event loop."""
        assert self._task is None, f"{self._name} has been started before"
        self._task = asyncio.create_task(self._run(), name=self._name)

    def cancel(self) -> None:
        """Ask the task to end, without waiting for it."""
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        """End the task; return when it has ended."""
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
                problem: BaseException = error  # something that the task waited for was cancelled
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
