"""Admission of requests: limits on how many may wait, and with how many prompt tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import InvalidArgument, Overloaded
from server.serving.fair_queue import FairQueue

_ID_ALLOWED = "at most 128 printable ASCII characters"
_MAX_RETRY_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class Admitted:
    """A request in flight; ``num_tokens`` is the length of its prompt, 0 until it is known.

    ``request_id`` comes from the client; another client may use the same one. ``engine_id`` is made
    here and unique; the engine gets no other.
    """

    request_id: str
    engine_id: str
    client: str
    num_tokens: int = 0
    is_waiting: bool = True

    @property
    def title(self) -> str:
        """What the log calls the request."""
        return f"request {self.request_id} of client {self.client or 'unknown'}"


@dataclass(slots=True)
class _Share:
    """A client's waiting requests."""

    num_requests: int = 0
    num_tokens: int = 0


class Admission:
    """The requests in flight, and limits on those that wait: their number and prompt tokens.

    If there is no room for a request, and another client has more in one of the queues than this
    client would have, that client's newest request in the queue is refused instead.
    """

    def __init__(
        self,
        queue: FairQueue,
        max_waiting: int,
        max_waiting_tokens: int | None = None,
        *,
        other_queues: Sequence[FairQueue] = (),
    ) -> None:
        """``queue`` is the engine's; ``other_queues`` are those that requests wait in before it."""
        self._queue = queue
        # Room is made in the tokenizers' queues first: requests there have cost least so far.
        self._queues = [*other_queues, queue]
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        # Keys are (client, request id).
        self._in_flight: dict[tuple[str, str], Admitted] = {}
        self._shares: dict[str, _Share] = {}
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @contextmanager
    def admit(self, request_id: str, client: str = "") -> Iterator[Admitted]:
        """Let a request in; an empty id is replaced by one that is made.

        Raises :class:`InvalidArgument` for an id that is not allowed or that a request of this
        client has already, and :class:`Overloaded` where there is no room.
        """
        if len(request_id) > 128 or not (request_id.isascii() and request_id.isprintable()):
            raise InvalidArgument("request_id", request_id, _ID_ALLOWED)
        engine_id = uuid.uuid4().hex
        request_id = request_id or engine_id
        key = client, request_id
        if key in self._in_flight:
            raise InvalidArgument("request_id", request_id, "an id that no running request has")
        self._require_room_for_request(client)
        # A prompt has at least one token. If not even that fits, it need not be tokenized.
        self._require_room_for_tokens(client, 1)
        admitted = self._in_flight[key] = Admitted(request_id, engine_id, client)
        self._shares.setdefault(client, _Share()).num_requests += 1
        self._num_waiting += 1
        self._idle.clear()
        try:
            yield admitted
        finally:
            self.begin(admitted)
            del self._in_flight[key]
            if not self._in_flight:
                self._idle.set()

    def count_tokens(self, admitted: Admitted, num_tokens: int) -> None:
        """Note the length of the prompt.

        Raises :class:`Overloaded` if there is no room for it. There always is if no other waits.
        """
        self._require_room_for_tokens(admitted.client, num_tokens)
        admitted.num_tokens = num_tokens
        if admitted.is_waiting:
            self._shares[admitted.client].num_tokens += num_tokens
            self._num_waiting_tokens += num_tokens

    def begin(self, admitted: Admitted) -> None:
        """Note that a request does not wait any more; may be called again."""
        if not admitted.is_waiting:
            return
        admitted.is_waiting = False
        self._num_waiting -= 1
        self._num_waiting_tokens -= admitted.num_tokens
        share = self._shares[admitted.client]
        share.num_requests -= 1
        share.num_tokens -= admitted.num_tokens
        if not share.num_requests:
            del self._shares[admitted.client]

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    def _require_room_for_request(self, client: str) -> None:
        while self._num_waiting >= self._max_waiting:
            size = self._shares.get(client, _Share()).num_requests + 1
            if not self._make_room(client, size, in_tokens=False):
                raise Overloaded(
                    f"{self._num_waiting} requests wait, as many as max_waiting allows; try again",
                    self._retry_after(client),
                )

    def _require_room_for_tokens(self, client: str, num_tokens: int) -> None:
        limit = self._max_waiting_tokens
        while limit is not None and 0 < self._num_waiting_tokens > limit - num_tokens:
            size = self._shares.get(client, _Share()).num_tokens + num_tokens
            if not self._make_room(client, size, in_tokens=True):
                raise Overloaded(
                    f"{self._num_waiting_tokens} prompt tokens wait, and max_waiting_tokens "
                    f"allows {limit}; try again",
                    self._retry_after(client),
                )

    def _make_room(self, client: str, size: int, *, in_tokens: bool) -> bool:
        return any(
            queue.make_room(client, size, in_tokens=in_tokens, retry_after=self._retry_after)
            for queue in self._queues
        )

    def _retry_after(self, client: str) -> float:
        return min(max(1.0, self._queue.seconds_until_start(client)), _MAX_RETRY_SECONDS)
