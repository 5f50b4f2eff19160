"""A buffer of generated tokens that the client has not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Self

from server.engine.base import GenerationDelta
from server.errors import Overloaded

# Tokens and log-probabilities of a merged delta. A client's library refuses messages that are
# larger than it expects, 4 MiB by default.
_MAX_DELTA_SIZE = 4096


class OutputBuffer:
    """Takes a request's deltas as they come, and merges those that the client has not read.

    So a slow client does not keep the engine busy. The buffer holds at most the tokens that the
    request may generate, and at most ``max_buffered_tokens`` tokens and log-probabilities.
    """

    def __init__(
        self, on_delta: Callable[[GenerationDelta], None], max_buffered_tokens: int | None = None
    ) -> None:
        """``on_delta`` is called with every delta when the engine brings it."""
        self._on_delta = on_delta
        self._max_buffered_tokens = max_buffered_tokens
        self._deltas: deque[GenerationDelta] = deque()
        self._num_buffered = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, deltas: AsyncGenerator[GenerationDelta, None]) -> AsyncIterator[Self]:
        """Read ``deltas`` to their end, while the caller iterates over the buffer.

        Leaving closes ``deltas``. The iterator raises their errors after the deltas before, and
        :class:`Overloaded` if the client leaves more unread than it may.
        """
        self._task = asyncio.create_task(self._read(deltas))
        self._task.add_done_callback(lambda _: self._changed.set())
        try:
            yield self
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationDelta:
        assert self._task is not None
        while not self._deltas:
            if self._task.done():
                self._task.result()
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        delta = self._deltas.popleft()
        self._num_buffered -= _size(delta)
        return delta

    async def _read(self, deltas: AsyncGenerator[GenerationDelta, None]) -> None:
        async with aclosing(deltas):
            async for delta in deltas:
                self._on_delta(delta)
                self._add(delta)

    def _add(self, delta: GenerationDelta) -> None:
        size = _size(delta)
        self._num_buffered += size
        if self._max_buffered_tokens is not None and self._num_buffered > self._max_buffered_tokens:
            self._deltas.clear()
            raise Overloaded(
                f"the client has left {self._num_buffered} tokens and log-probabilities unread, "
                f"and max_buffered_tokens allows {self._max_buffered_tokens}",
                retry_after=1.0,
            )
        if self._deltas and _size(self._deltas[-1]) + size <= _MAX_DELTA_SIZE:
            self._deltas.append(merged(self._deltas.pop(), delta))
        else:
            self._deltas.append(delta)
        self._changed.set()


def merged(first: GenerationDelta, second: GenerationDelta) -> GenerationDelta:
    """Return what two deltas in a row add to a request."""
    return GenerationDelta(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        scores=first.scores + second.scores,
        num_cached_tokens=first.num_cached_tokens,
        queue_seconds=first.queue_seconds,
        finish_reason=second.finish_reason,
        stopped_by=second.stopped_by,
        prompt_scores=first.prompt_scores + second.prompt_scores,
    )


def _size(delta: GenerationDelta) -> int:
    scores = (*delta.prompt_scores, *delta.scores)
    return len(delta.token_ids) + sum(1 + len(score.top) for score in scores)
