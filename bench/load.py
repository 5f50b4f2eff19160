"""Loads: closed and open loops of requests, with the time of each token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from bench.statistics import Percentiles
from bench.workload import Request

# Yields the number of tokens in each message of a stream.
Generate = Callable[[Request], AsyncIterator[int]]


@dataclass(slots=True)
class Timeline:
    """The times at which one request was due and its tokens came, in seconds of one clock."""

    due: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0][0] - self.due

    def inter_token_latencies(self) -> list[float]:
        """Return the latency of each token after the first message.

        Tokens of one message share the time since the message before equally.
        """
        pairs = pairwise(self.arrivals)
        return [(now - before) / count for (before, _), (now, count) in pairs for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one load; ``begin`` and ``end`` bound the time that counts."""

    timelines: tuple[Timeline, ...]
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def num_tokens(self) -> int:
        return sum(
            count
            for timeline in self.timelines
            for moment, count in timeline.arrivals
            if self.begin <= moment <= self.end
        )

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def time_to_first_token(self) -> Percentiles | None:
        return Percentiles.of([t.time_to_first_token for t in self.timelines if t.arrivals])

    def inter_token_latency(self) -> Percentiles | None:
        return Percentiles.of(
            [gap for timeline in self.timelines for gap in timeline.inter_token_latencies()]
        )


async def closed_loop(generate: Generate, streams: Sequence[Sequence[Request]]) -> Load:
    """Run every stream's requests one after another, all streams at once, to their end."""
    begin = time.perf_counter()

    async def one(requests: Sequence[Request]) -> list[Timeline]:
        return [await _follow(generate, request, time.perf_counter()) for request in requests]

    timelines = await asyncio.gather(*[one(requests) for requests in streams])
    return Load(tuple(t for of_stream in timelines for t in of_stream), begin, time.perf_counter())


async def steady_loop(
    generates: Sequence[Generate], streams: Sequence[Sequence[Request]], seconds: float
) -> list[Load]:
    """Keep every stream busy, repeating its requests, and count for ``seconds``.

    Stream i goes to ``generates[i]``. Returns one :class:`Load` for each stream, all over the same
    time. It begins when each stream has got its first token, so that neither the start counts nor
    an end at which some streams have finished.
    """
    timelines: list[list[Timeline]] = [[] for _ in streams]
    begun = [asyncio.Event() for _ in streams]

    async def one(stream: int) -> None:
        while True:
            for request in streams[stream]:
                timeline = Timeline(time.perf_counter())
                timelines[stream].append(timeline)
                await _fill(timeline, generates[stream], request, begun[stream])

    tasks = [asyncio.create_task(one(stream)) for stream in range(len(streams))]
    waiting = asyncio.create_task(_all_set(begun))
    try:
        # A stream that fails would never begin.
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        begin = time.perf_counter()
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in (waiting, *tasks):
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)
    return [Load(tuple(of_stream), begin, begin + seconds) for of_stream in timelines]


async def _all_set(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


async def open_loop(
    generate: Generate, requests: Sequence[Request], arrivals: Sequence[float]
) -> Load:
    """Send each request when it is due, whether or not earlier ones have ended.

    Times count from the moment a request was due, not from the moment it was sent. Otherwise a
    late load generator would hide how long a busy server makes clients wait.
    """
    begin = time.perf_counter()

    async def one(request: Request, arrival: float) -> Timeline:
        due = begin + arrival
        await asyncio.sleep(due - time.perf_counter())
        return await _follow(generate, request, due)

    pairs = zip(requests, arrivals, strict=True)
    timelines = await asyncio.gather(*[one(*pair) for pair in pairs])
    return Load(tuple(timelines), begin, time.perf_counter())


async def _follow(generate: Generate, request: Request, due: float) -> Timeline:
    timeline = Timeline(due)
    await _fill(timeline, generate, request)
    if timeline.num_tokens != request.num_tokens:
        raise RuntimeError(
            f"got {timeline.num_tokens} tokens where {request.num_tokens} were asked for"
        )
    return timeline


async def _fill(
    timeline: Timeline, generate: Generate, request: Request, begun: asyncio.Event | None = None
) -> None:
    # Generators have it, though the type of the iterator does not say so.
    async with aclosing(cast(Any, generate(request))) as messages:
        async for count in messages:
            if count:
                timeline.arrivals.append((time.perf_counter(), count))
                if begun is not None:
                    begun.set()
