"""The run of one generation request in the engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Protocol

from server.calls.generation import FinishInfo, GenerationEvent, Timings
from server.depth.served_depth import ServedDepth
from server.engine.base import Engine, EngineDead, GenerationDelta, GenerationRequest
from server.serving.attempts import Attempts, without_lost_repair
from server.serving.output_buffer import OutputBuffer


class StepObserver(Protocol):
    """Observer of a request's steps, called when the engine makes them; times are in seconds.

    How fast the client reads makes no difference.
    """

    def first_step(self, num_tokens: int, *, queue: float, seconds: float) -> None:
        """The first step: the request waited for ``queue``, and ``seconds`` until this moment."""

    def next_step(self, num_tokens: int, *, seconds: float) -> None:
        """Another step, ``seconds`` after the one before."""

    def finished(self) -> None:
        """The engine is done with the request."""


class RequestRunner:
    """Runs ``request``, which arrived at ``arrived`` on the monotonic clock."""

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        served: ServedDepth,
        arrived: float,
        attempts: Attempts,
        observer: StepObserver,
        *,
        max_buffered_tokens: int | None = None,
    ) -> None:
        """``max_buffered_tokens``: see :class:`OutputBuffer`."""
        self._engine = engine
        self._request = request
        self._served = served
        self._arrived = arrived
        self._attempts = attempts
        self._observer = observer
        self._max_buffered_tokens = max_buffered_tokens
        self._submitted = self._queue = self._first_token = 0.0
        # The time of the latest step since the request came; None before the first.
        self._latest: float | None = None
        self._num_generated = self._num_cached = 0

    async def events(
        self, preface: Sequence[GenerationEvent]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield ``preface``, what the engine's steps add, and :class:`FinishInfo`.

        Closing it frees the engine. Raises :class:`server.errors.Unavailable` when the engine has
        died and the request is not to run again.
        """
        for event in preface:
            yield event
        while True:
            self._attempts.begin()
            layers, self._served = without_lost_repair(
                self._engine, self._request.layers, self._served
            )
            self._request = replace(self._request, layers=layers)
            self._submitted = self._elapsed()
            buffer = OutputBuffer(self._note, self._max_buffered_tokens)
            try:
                async with buffer.running(self._engine.generate(self._request)):
                    async for delta in buffer:
                        yield delta
                        if delta.finish_reason is not None:
                            yield self._finish_info(delta)
                            return
            except EngineDead as error:
                await self._attempts.survive(error, has_begun=self._latest is not None)
            else:
                raise RuntimeError(f"the engine ended {self._request.request_id} without a reason")

    def _finish_info(self, last: GenerationDelta) -> FinishInfo:
        assert last.finish_reason is not None
        assert self._latest is not None
        return FinishInfo(
            reason=last.finish_reason,
            stopped_by=last.stopped_by,
            num_prompt_tokens=len(self._request.prompt_ids),
            num_generated_tokens=self._num_generated,
            num_cached_tokens=self._num_cached,
            timings=Timings(self._queue, self._first_token, self._latest),
            served=self._served,
        )

    def _note(self, delta: GenerationDelta) -> None:
        elapsed, num_tokens = self._elapsed(), len(delta.token_ids)
        self._num_generated += num_tokens
        if self._latest is None:
            self._queue, self._first_token = self._submitted + delta.queue_seconds, elapsed
            self._num_cached = delta.num_cached_tokens
            self._observer.first_step(num_tokens, queue=self._queue, seconds=elapsed)
        else:
            self._observer.next_step(num_tokens, seconds=elapsed - self._latest)
        self._latest = elapsed
        if delta.finish_reason is not None:
            self._observer.finished()

    def _elapsed(self) -> float:
        return time.monotonic() - self._arrived
