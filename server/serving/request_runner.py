"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable

from server.calls.generation import FinishInfo, GenerationEvent, Timings
from server.depth.policy import ServedDepth
from server.engine.base import Engine, GenerationDelta, GenerationRequest
from server.serving.output_buffer import OutputBuffer
from server.telemetry.metrics import Metrics


class RequestRunner:
    """Runs ``request``, which came at ``arrived`` on the monotonic clock, and measures it.

    What is measured is the engine's pace, however slowly the client reads.
    """

    def __init__(
        self,
        request: GenerationRequest,
        served: ServedDepth,
        arrived: float,
        metrics: Metrics,
        *,
        on_tokens: Callable[[int], None],
        on_latency: Callable[[float, int | None], None],
        on_end: Callable[[], None],
        max_unread: int | None = None,
    ) -> None:
        """Tell how it goes.

        ``on_tokens`` is called with the number of tokens of each step, ``on_latency`` with its
        time since the step before and that number, or None for the first, whose time is that
        since the request came. ``on_end`` is called when the engine is done.
        """
        self.request = request
        self.served = served
        self._arrived = arrived
        self._metrics = metrics
        self._on_tokens = on_tokens
        self._on_latency = on_latency
        self._on_end = on_end
        self._max_unread = max_unread
        self._submitted = 0.0
        self._queue = self._first_token = 0.0
        self._latest: float | None = None
        self._num_generated = self._num_cached = 0

    @property
    def has_begun(self) -> bool:
        """Whether the engine has generated anything."""
        return self._latest is not None

    async def events(self, engine: Engine) -> AsyncGenerator[GenerationEvent, None]:
        """Yield what the engine's steps add, and :class:`FinishInfo`; closing it frees the engine.

        May be called again after :class:`server.engine.base.EngineDead` unless it has begun.
        """
        self._submitted = self._elapsed()
        buffer = OutputBuffer(self._note, self._max_unread)
        async with buffer.running(engine.generate(self.request)) as deltas:
            async for delta in deltas:
                yield delta
                if delta.finish_reason is not None:
                    assert self._latest is not None
                    yield FinishInfo(
                        reason=delta.finish_reason,
                        stopped_by=delta.stopped_by,
                        num_prompt_tokens=len(self.request.prompt_ids),
                        num_generated_tokens=self._num_generated,
                        num_cached_tokens=self._num_cached,
                        timings=Timings(self._queue, self._first_token, self._latest),
                        served=self.served,
                    )
                    return
        raise RuntimeError(f"the engine ended request {self.request.request_id} without a reason")

    def _note(self, delta: GenerationDelta) -> None:
        depth, elapsed = self.served.decode_layers, self._elapsed()
        num_tokens = len(delta.token_ids)
        if self._latest is None:
            self._queue, self._first_token = self._submitted + delta.queue_seconds, elapsed
            self._num_cached = delta.num_cached_tokens
            num_prompt_tokens = len(self.request.prompt_ids)
            self._metrics.begin(depth, num_prompt_tokens, self._queue, self._first_token)
            self._on_latency(elapsed, None)
        else:
            self._metrics.observe_gap(depth, elapsed - self._latest, num_tokens)
            self._on_latency(elapsed - self._latest, num_tokens)
        self._latest = elapsed
        self._num_generated += num_tokens
        self._metrics.add_tokens(depth, num_tokens)
        self._on_tokens(num_tokens)
        if delta.finish_reason is not None:
            self._on_end()

    def _elapsed(self) -> float:
        return time.monotonic() - self._arrived
