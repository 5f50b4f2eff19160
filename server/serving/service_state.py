"""The state of a service, from its start to its end."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.depth.repair import RepairStatus
from server.engine.base import LoadInfo
from server.errors import FailedPrecondition, Unavailable
from server.telemetry.metrics import Metrics

ENGINE_DEAD = "the engine has died; it is being started again"

logger = logging.getLogger(__name__)


class State(enum.Enum):
    """What a service is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENGINE_DOWN = "engine down"


@dataclass(frozen=True, slots=True)
class Status:
    """A service at this moment; times in seconds."""

    state: State
    # The step of the start that is being taken; empty once the service is open.
    startup_phase: str
    startup_seconds: dict[str, float]
    load: LoadInfo
    uptime: float
    num_engine_restarts: int
    version: str
    # The levels that requests which generate and which score get now if they leave the depth to
    # the server; empty until known.
    auto_level: str
    auto_score_level: str
    # What is wrong with depths that the server has checked, one sentence each.
    problems: tuple[str, ...] = ()
    repair: RepairStatus = field(default_factory=RepairStatus)
    # What is wrong with levels that were asked for by their quality, and with measurements of
    # depths, one sentence each.
    level_problems: tuple[str, ...] = ()
    # What is still to be measured while serving.
    unmeasured: tuple[str, ...] = ()


class ServiceState:
    """The state of a service, from STARTING on, and how its start goes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._state = State.STARTING
        self._changed = asyncio.Event()
        self._created = time.monotonic()
        self._is_closing = False
        self._is_damaged = False
        self.problems: tuple[str, ...] = ()
        self.startup_phase = "initializing"
        self.startup_seconds: dict[str, float] = {}

    @property
    def state(self) -> State:
        return self._state

    @property
    def uptime(self) -> float:
        return time.monotonic() - self._created

    def turn_to(self, state: State) -> None:
        """Enter a state, and wake all that wait for a change, if it is another one."""
        if state is not self._state:
            logger.info("%s", state.value)
            self._state = state
            self._tell_change()

    def set_problems(self, problems: tuple[str, ...], *, is_damaged: bool) -> None:
        """Say what is wrong with some depths; ``is_damaged``: with the default one, too."""
        self.problems = problems
        if is_damaged is not self._is_damaged:
            self._is_damaged = is_damaged
            self._tell_change()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served, and the default depth gives results."""
        return self._state is State.SERVING and not self._is_damaged

    async def health_after(self, seen: bool) -> bool:
        """Return :attr:`is_healthy` as soon as it is not ``seen``."""
        while self.is_healthy is seen:
            await self._changed.wait()
        return self.is_healthy

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def drain(self, *, for_good: bool) -> None:
        """Enter DRAINING; ``for_good``: no :meth:`require_draining` succeeds any more."""
        self._is_closing |= for_good
        self.turn_to(State.DRAINING)

    def require_draining(self) -> None:
        """Raise :class:`FailedPrecondition` unless the state is a DRAINING that can be left."""
        if self._is_closing:
            raise FailedPrecondition("the server is being stopped")
        if self._state is not State.DRAINING:
            raise FailedPrecondition(f"the server is not draining; it is {self._state.value}")

    async def state_after(self, seen: State) -> State:
        """Return the state as soon as it is not ``seen``; states that were brief are missed."""
        while self._state is seen:
            await self._changed.wait()
        return self._state

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the start is doing meanwhile, and record how long it took in all."""
        self.startup_phase = name
        started = time.monotonic()
        yield
        before = self.startup_seconds.get(name, 0.0)
        self.startup_seconds[name] = before + time.monotonic() - started
        self._metrics.set_startup(name, self.startup_seconds[name])

    def require_started(self) -> None:
        """Raise :class:`Unavailable`, naming the phase, while the start has phases to go."""
        if self.startup_phase:
            raise self._starting()

    def require_serving(self) -> None:
        """Raise :class:`Unavailable`, with the reason, in every state but SERVING."""
        match self._state:
            case State.STARTING:
                raise self._starting()
            case State.DRAINING:
                raise Unavailable("the server is draining and takes no more requests")
            case State.ENGINE_DOWN:
                raise Unavailable(ENGINE_DEAD)

    def _starting(self) -> Unavailable:
        return Unavailable(f"the server is starting: {self.startup_phase}")
