"""The order in which requests start: each client gets its share of the engine.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
arXiv 2401.00588, algorithm 2): a client's counter grows by the work that is done for it, and the
next slot goes to the waiting client whose counter is smallest. A client that comes back starts
no lower than those who wait, so that idling earns no credit. No slot stays empty while a request
waits.
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

# There may be as many clients as addresses: those that have been idle longest are forgotten.
_MAX_IDLE_CLIENTS = 4096
# Starts that the pace is measured by: the latest, and no fewer than are needed.
_NUM_STARTS, _NUM_STARTS_NEEDED = 512, 16
# A wait that is told to a client must be sure even at so many times the pace that was measured.
_OPTIMISM = 2.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Who waits for slots, and how long: ``deadline`` is a time of the queue's clock.

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
    """Return how many requests an engine is given that runs ``max_num_seqs`` in one batch.

    Some more, so that the engine has the next one at hand in the very step that one ends.
    """
    return max_num_seqs + max(2, max_num_seqs // 8)


@dataclass(slots=True)
class _Client:
    counter: float = 0.0
    # The number of its latest start, of all starts.
    latest_start: int = 0
    num_running: int = 0
    waiting: deque[Slot] = field(default_factory=deque)


class FairQueue:
    """Requests in front of an engine that is given ``num_slots`` at a time; None: all."""

    def __init__(
        self, num_slots: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_slots: float = math.inf if num_slots is None else num_slots
        self._clock = clock
        # Those with requests, and those without, the one that has been idle longest first.
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
        """Fit for any thread."""
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
        """Whether there may be requests that have to wait."""
        return self._num_slots < math.inf

    def set_num_slots(self, num_slots: int) -> None:
        """Give the engine so many requests at a time; those that run beyond that go on."""
        if num_slots != self._num_slots:
            self._num_slots = num_slots
            self._starts.clear()  # the pace is another one
            self._start_next()

    def longest_wait(self) -> float:
        """Return how long the request has waited that has waited longest, in seconds."""
        oldest = [c.waiting[0].since for c in self._clients.values() if c.waiting]
        return self._clock() - min(oldest) if oldest else 0.0

    def seconds_until_start(self, client: str) -> float:
        """Return a time by which one more request of that client will not have started.

        0.0 where starts have not been measured. Requests of one client start in order, so those
        before it come first for sure; how others mix in between is left out.
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
        """Return the slot of a request of so many prompt tokens, which cost so much.

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
            # Whatever ended the wait, a slot that was given meanwhile goes to another.
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
        """Refuse the newest request of the client that has most of what waits here.

        Returns False, and refuses none, unless that client has more than ``size``, which is what
        ``client`` would have; in tokens or in requests. ``retry_after`` returns when a client may
        try again, in seconds; the refused one is told its own.
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
        """End the wait of all that wait, each with an error of its own."""
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
        slot.started.exception()  # seen, even where the one that waits is cancelled meanwhile
