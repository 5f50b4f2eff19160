"""Which requests are in the engine, and whether there is room for one more."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import InvalidArgument, Overloaded

_ID_ALLOWED = "at most 128 printable ASCII characters"


class Admission:
    """The requests in flight, of which at most ``max_waiting`` wait for their first token."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._running: set[str] = set()
        self._waiting: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._running) + len(self._waiting)

    @contextmanager
    def admit(self, request_id: str) -> Iterator[str]:
        """Hold a place for a request; an empty id is replaced by one that is made.

        Raises :class:`InvalidArgument` for an id that is not allowed or is in flight already,
        and :class:`Overloaded` where too many requests wait.
        """
        if not request_id:
            request_id = uuid.uuid4().hex
        if len(request_id) > 128 or not (request_id.isascii() and request_id.isprintable()):
            raise InvalidArgument("request_id", request_id, _ID_ALLOWED)
        if request_id in self._waiting or request_id in self._running:
            raise InvalidArgument("request_id", request_id, "an id that no running request has")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait, as many as max_waiting allows; try again",
                retry_after=1.0,
            )
        self._waiting.add(request_id)
        self._idle.clear()
        try:
            yield request_id
        finally:
            self._waiting.discard(request_id)
            self._running.discard(request_id)
            if not self.num_in_flight:
                self._idle.set()

    def begin(self, request_id: str) -> None:
        """Note that an admitted request has its first token: it waits no longer."""
        self._waiting.discard(request_id)
        self._running.add(request_id)

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()
