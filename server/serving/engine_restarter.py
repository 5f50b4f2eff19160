"""Restarts of the engine of a service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.background import BackgroundTask
from server.engine.base import Engine, EngineDead
from server.engine.supervisor import Supervisor
from server.engine.watchdog import Watchdog
from server.errors import Unavailable
from server.serving.fair_queue import FairQueue
from server.serving.service_state import ENGINE_DEAD, ServiceState, State
from server.telemetry.metrics import Metrics


class EngineRestarter:
    """Starts the engine again when it dies or hangs; updates the service's state and queue."""

    def __init__(
        self,
        engine: Engine,
        state: ServiceState,
        queue: FairQueue,
        metrics: Metrics,
        *,
        timeout_seconds: float,
        stall_seconds: float,
        poll_seconds: float,
        first_delay: float,
        max_delay: float,
        on_restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._state = state
        self._queue = queue
        self._metrics = metrics
        self._on_restarted = on_restarted
        self._num_restarts = 0
        self._resumed = asyncio.Event()
        self._supervisor = Supervisor(
            engine,
            self._died,
            self._restarted,
            self._restart_failed,
            poll_seconds=poll_seconds,
            first_delay=first_delay,
            max_delay=max_delay,
        )
        self._watchdog = (
            Watchdog(engine, timeout_seconds, stall_seconds=stall_seconds)
            if timeout_seconds and not engine.restarts_itself
            else None
        )
        engine.on_restart = self._count_restart

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    def tasks(self) -> list[BackgroundTask]:
        """Return the tasks that must run as long as the engine is to be kept alive."""
        tasks = [BackgroundTask("the engine's supervisor", self._supervise)]
        if self._watchdog is not None:
            tasks.append(BackgroundTask("the engine's watchdog", self._watchdog.run))
        return tasks

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the engine's death into :class:`Unavailable`, and note it."""
        num_restarts = self._num_restarts
        try:
            yield
        except EngineDead as error:
            self.note_death(num_restarts)
            raise Unavailable(ENGINE_DEAD) from error

    def note_death(self, num_restarts: int) -> None:
        """Note that a request has found the engine dead.

        ``num_restarts`` is the number of restarts before the request began.
        """
        # Otherwise the engine has been restarted since, and the death has been dealt with.
        if num_restarts == self._num_restarts:
            self._died()
            self._supervisor.report_death()

    def resume(self) -> None:
        """Serve again after a drain, during which a dead engine is left dead."""
        if self._engine.is_alive:
            self._state.turn_to(State.SERVING)
            self._queue.resume()
        else:
            self._state.turn_to(State.ENGINE_DOWN)
            self._queue.pause()
            self._supervisor.report_death()
        self._resumed.set()

    async def _supervise(self) -> None:
        while True:
            await self._supervisor.run()  # ends when the engine dies during a drain
            await self._resumed.wait()
            self._resumed.clear()

    def _died(self) -> bool:
        """Return whether the engine is to be started again."""
        if self._state.state is State.SERVING:
            self._state.turn_to(State.ENGINE_DOWN)
        if self._state.state is State.ENGINE_DOWN:
            self._queue.pause()
            return True
        self._queue.fail(lambda: Unavailable("the engine has died, and the server is draining"))
        return False

    def _count_restart(self) -> None:
        self._num_restarts += 1
        self._metrics.count_engine_restart()
        self._on_restarted()

    def _restarted(self) -> None:
        if not self._engine.restarts_itself:  # else it has counted
            self._count_restart()
        if self._state.state is State.ENGINE_DOWN:
            self._state.turn_to(State.SERVING)
        self._queue.resume()

    def _restart_failed(self) -> None:
        self._queue.fail(lambda: Unavailable("the engine has died, and could not be started again"))
