"""A queue that gives each client a fair share of the engine.

It uses virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
arXiv 2401.00588, algorithm 2). A client's counter grows by the work that is done for it, and the
next slot goes to the waiting client with the smallest counter. The counter of a client that comes
back is raised to the smallest one of those that wait, so that being idle earns no credit. No slot
stays empty while a request waits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from server.depth.sliding_window import SlidingWindow
from server.errors import DeadlineTooSoon, Overloaded

# Every address may be a client, so those that have been idle longest are forgotten.
_MAX_IDLE_CLIENTS = 4096
# The pace of starts is measured over the latest ones, if there are enough.
_NUM_STARTS, _NUM_STARTS_NEEDED = 512, 16
# Clients are told the wait at so many times the measured pace, so that it is a lower bound.
_OPTIMISM = 2.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A request's claim to slots: its client and its deadline, a time of the queue's clock.

    ``on_refused`` is called when the request has to make room for another client.
    """

    client: str = ""
    deadline: float = math.inf
    on_refused: Callable[[], None] = lambda: None


class Slot:
    """A request's slot in the engine: entering waits for it, leaving gives it back."""

    def __init__(
        self,
        queue: FairQueue,
        client: str,
        num_tokens: int,
        cost: float,
        deadline: float,
        on_refused: Callable[[], None],
    ) -> None:
        self.client = client
        self.num_tokens = num_tokens
        # The cost of the prompt is charged when the request starts.
        self.cost = cost
        self.deadline = deadline
        self.on_refused = on_refused
        self.since = 0.0
        self.is_running = False
        self.started: asyncio.Future[None] | None = None
        self._queue = queue

    async def __aenter__(self) -> Self:
        await self._queue.enter(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def charge(self, cost: float) -> None:
        """Count work that was done for the request."""
        self._queue.charge(self, cost)

    def end(self) -> None:
        """Give the slot back, so that the next request starts; may be called twice."""
        self._queue.leave(self)

    async def again(self) -> None:
        """Wait for another slot, before the client's other requests."""
        self.end()
        await self._queue.enter(self, first=True)


def slots_for(max_num_seqs: int) -> int:
    """Return how many requests to give to an engine that runs ``max_num_seqs`` in one batch.

    There are a few more, so that the next request can start in the very step in which one ends.
    """
    return max_num_seqs + max(2, max_num_seqs // 8)


@dataclass(slots=True)
class _Client:
    counter: float = 0.0
    # Number of the client's latest start, counted over all clients.
    latest_start: int = 0
    num_running: int = 0
    waiting: deque[Slot] = field(default_factory=deque)


class FairQueue:
    """The queue of an engine that gets ``num_slots`` requests at a time; None: all."""

    def __init__(
        self, num_slots: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_slots: float = math.inf if num_slots is None else num_slots
        self._clock = clock
        # Clients with requests, and idle ones, beginning with the one that is idle longest.
        self._clients: dict[str, _Client] = {}
        self._idle: OrderedDict[str, _Client] = OrderedDict()
        self._num_running = 0
        self._num_waiting = 0
        self._num_starts = 0
        # The counter of the client that was served last.
        self._virtual_time = 0.0
        self._paused = False
        # The latest starts while others waited.
        self._starts = SlidingWindow(grain=0.0, max_grains=_NUM_STARTS)

    @property
    def num_waiting(self) -> int:
        """How many requests wait; may be read from any thread."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def utilization(self) -> float:
        """The share of the slots that are taken; 0.0 where there is no limit."""
        return min(1.0, self._num_running / self._num_slots)

    @property
    def is_limited(self) -> bool:
        """Whether the number of slots is limited, so that requests may have to wait."""
        return self._num_slots < math.inf

    def set_num_slots(self, num_slots: int) -> None:
        """Change the number of slots; requests that run already go on, even if they are more."""
        if num_slots != self._num_slots:
            self._num_slots = num_slots
            self._starts.clear()  # the pace will be another one
            self._start_next()

    def longest_wait(self) -> float:
        """Return the longest time that a request has been waiting, in seconds."""
        oldest = [c.waiting[0].since for c in self._clients.values() if c.waiting]
        return self._clock() - min(oldest) if oldest else 0.0

    def seconds_until_start(self, client: str) -> float:
        """Return a lower bound of the time until another request of that client can start.

        The client's requests start in order, so those that wait come first. Other clients'
        requests, which start in between, are not counted. 0.0 if the pace is not known.
        """
        own = self._clients.get(client)
        if own is None:
            return 0.0
        return len(own.waiting) * self._starts.interval(_NUM_STARTS_NEEDED) / _OPTIMISM

    def slot(
        self,
        client: str,
        num_tokens: int = 0,
        cost: float = 0.0,
        *,
        deadline: float = math.inf,
        on_refused: Callable[[], None] = lambda: None,
    ) -> Slot:
        """Return the slot of a request with ``num_tokens`` prompt tokens, which cost ``cost``.

        ``deadline`` is a time of the clock. ``on_refused`` is called when the request has to make
        room in a full queue for another client.
        """
        return Slot(self, client, num_tokens, cost, deadline, on_refused)

    async def enter(self, slot: Slot, *, first: bool = False) -> None:
        """Wait until the slot is free; ``first``: before the client's other requests.

        Raises :class:`DeadlineTooSoon` at once where the request cannot start before its
        deadline, :class:`Overloaded` when it has to make room, and what :meth:`fail` is given.
        """
        now = self._clock()
        if not first and now + (seconds := self.seconds_until_start(slot.client)) > slot.deadline:
            raise DeadlineTooSoon(
                f"the deadline is in {max(0.0, slot.deadline - now):.3g} s, but the requests "
                f"before this one take {seconds:.3g} s at least"
            )
        slot.since = now
        slot.started = asyncio.get_running_loop().create_future()
        self._line_up(slot, first=first)
        self._start_next()
        try:
            await slot.started
        except BaseException:
            # The slot may have been given in the same moment; it must not be lost.
            self.leave(slot)
            raise

    def charge(self, slot: Slot, cost: float) -> None:
        """Count work that was done for a request that runs."""
        if slot.is_running:
            self._clients[slot.client].counter += cost

    def leave(self, slot: Slot) -> None:
        """Give the slot back; nothing happens where the request has none any more."""
        client = self._clients.get(slot.client)
        if client is None:
            return
        if slot.is_running:
            slot.is_running = False
            client.num_running -= 1
            self._num_running -= 1
        elif slot in client.waiting:
            client.waiting.remove(slot)
            self._num_waiting -= 1
        self._rest(slot.client)
        self._start_next()

    def make_room(
        self, client: str, size: int, *, in_tokens: bool, retry_after: Callable[[str], float]
    ) -> bool:
        """Refuse the newest request of the client that has most waiting here, to make room.

        ``size`` is what ``client`` would have waiting, in tokens or in requests. Returns False, and
        refuses nothing, unless the other client has more. ``retry_after`` returns for a client in
        how many seconds it may try again.
        """

        def size_of(other: _Client) -> int:
            return sum(t.num_tokens for t in other.waiting) if in_tokens else len(other.waiting)

        waiting = [(name, other) for name, other in self._clients.items() if other.waiting]
        if not waiting:
            return False
        name, greediest = max(waiting, key=lambda item: size_of(item[1]))
        if name == client or size_of(greediest) <= size:
            return False
        slot = greediest.waiting.pop()
        self._num_waiting -= 1
        slot.on_refused()
        seconds = retry_after(slot.client)
        _refuse(
            slot,
            Overloaded("the queue is full, and its places are shared among clients", seconds),
        )
        return True

    def pause(self) -> None:
        """Start nothing until :meth:`resume`."""
        self._paused = True
        self._starts.clear()

    def resume(self) -> None:
        self._paused = False
        self._start_next()

    def fail(self, error: Callable[[], Exception]) -> None:
        """Refuse all waiting requests, each with an error of its own."""
        for client in list(self._clients.values()):
            while client.waiting:
                self._num_waiting -= 1
                _refuse(client.waiting.popleft(), error())

    def _line_up(self, slot: Slot, *, first: bool) -> None:
        client = self._clients.get(slot.client)
        if client is None:
            client = self._clients[slot.client] = self._idle.pop(slot.client, _Client())
        if not client.waiting:
            counters = [other.counter for other in self._clients.values() if other.waiting]
            client.counter = max(client.counter, min(counters, default=self._virtual_time))
        if first:
            client.waiting.appendleft(slot)
        else:
            client.waiting.append(slot)
        self._num_waiting += 1

    def _start_next(self) -> None:
        while not self._paused and self._num_running < self._num_slots:
            waiting = [client for client in self._clients.values() if client.waiting]
            if not waiting:
                self._starts.clear()
                return
            client = min(waiting, key=lambda each: (each.counter, each.latest_start))
            slot = client.waiting.popleft()
            self._num_waiting -= 1
            assert slot.started is not None
            if slot.started.done():  # cancelled, and about to leave
                continue
            self._num_starts += 1
            self._num_running += 1
            self._virtual_time = client.counter
            client.counter += slot.cost
            client.latest_start = self._num_starts
            client.num_running += 1
            slot.is_running = True
            slot.started.set_result(None)
            self._starts.add(self._clock())

    def _rest(self, name: str) -> None:
        client = self._clients[name]
        if client.waiting or client.num_running:
            return
        del self._clients[name]
        self._idle[name] = client
        if len(self._idle) > _MAX_IDLE_CLIENTS:
            self._idle.popitem(last=False)


def _refuse(slot: Slot, error: Exception) -> None:
    assert slot.started is not None
    if not slot.started.done():
        slot.started.set_exception(error)
        slot.started.exception()  # asyncio would complain if nobody read it
