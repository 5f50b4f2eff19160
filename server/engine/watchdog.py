"""Kills an engine that has stopped answering, so that it is started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import psutil

from server.engine.base import EngineDead
from server.engine.process_activity import activity_of

logger = logging.getLogger(__name__)

# Processes that neither answer nor do anything for so long hang.
_STALL_SECONDS = 10.0
# Processes that a signal has stopped cannot answer at all.
_STOPPED_SECONDS = 3.0


class Pingable(Protocol):
    """An engine that can stop answering."""

    @property
    def is_alive(self) -> bool: ...

    @property
    def process_ids(self) -> Sequence[int]: ...

    async def ping(self) -> None: ...


class Watchdog:
    """Asks the engine for a sign of life, and kills its processes when none comes.

    The engine answers between two steps, so ``timeout_seconds`` has to be longer than the longest
    step. There are two shorter times:

    - ``stall_seconds``, of an engine that does not answer and does nothing at all, as in a
      deadlock: none of its threads uses a processor, reads pages or files from a disk, writes to
      one, or waits for one;
    - ``stopped_seconds``, of an engine that was stopped by a signal and cannot answer.

    Time is counted in looks at the engine, so that a machine that was asleep harms nobody.
    """

    def __init__(
        self,
        engine: Pingable,
        timeout_seconds: float,
        *,
        stall_seconds: float = _STALL_SECONDS,
        stopped_seconds: float = _STOPPED_SECONDS,
        poll_seconds: float = 1.0,
    ) -> None:
        """Watch ``engine``; without ``stall_seconds`` a stall gets ``timeout_seconds``."""
        self._engine = engine
        self._timeout_seconds = timeout_seconds
        self._stall_seconds = min(stall_seconds or timeout_seconds, timeout_seconds)
        self._stopped_seconds = min(stopped_seconds, timeout_seconds)
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            if self._engine.is_alive and (problem := await self._problem()):
                logger.error("the engine %s; it is killed", problem)
                _kill(_processes(self._engine.process_ids))
                while self._engine.is_alive:
                    await asyncio.sleep(self._poll_seconds)

    async def _problem(self) -> str:
        """Return what is wrong, or an empty string once the engine has answered or ended."""
        ping = asyncio.create_task(self._ping())
        process_ids = list(self._engine.process_ids)
        processes = _processes(process_ids)
        activity = activity_of(processes)
        silent = still = stopped = 0.0
        try:
            while not (await asyncio.wait([ping], timeout=self._poll_seconds))[0]:
                # An engine that has died may never answer, and is not to be mistaken for the next.
                if not self._engine.is_alive or list(self._engine.process_ids) != process_ids:
                    return ""
                silent += self._poll_seconds
                still += self._poll_seconds
                stopped += self._poll_seconds
                before, activity = activity, activity_of(processes)
                if activity.has_worked_since(before) or not processes:
                    still = 0.0
                if not activity.is_stopped:
                    stopped = 0.0
                if stopped >= self._stopped_seconds:
                    return f"was stopped by a signal {stopped:g} s ago"
                if still >= self._stall_seconds:
                    return f"has not answered or done anything for {still:g} s ({activity})"
                if silent >= self._timeout_seconds:
                    return f"has not answered for {silent:g} s ({activity})"
            return ""
        finally:
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)

    async def _ping(self) -> None:
        try:
            await self._engine.ping()
        except EngineDead:
            pass  # the supervisor starts it again
        except Exception:
            logger.exception("the engine has answered its watchdog with an error")


def _processes(process_ids: Iterable[int]) -> list[psutil.Process]:
    """Return the processes and all that they have started, directly or not."""
    found = []
    for process_id in process_ids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(process_id)
            found += [process, *process.children(recursive=True)]
    return found


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
