"""The buffer between an engine that does not wait and a client that reads slowly."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.base import EngineDead, FinishReason, GenerationDelta, TokenScore
from server.errors import Overloaded
from server.serving.output_buffer import OutputBuffer, merged


def delta(number: int, *, num_top: int | None = None, last: bool = False) -> GenerationDelta:
    top = tuple(TokenScore(i, -1.0, "") for i in range(num_top or 0))
    return GenerationDelta(
        text=f"{number} ",
        token_ids=(number,),
        scores=() if num_top is None else (TokenScore(number, -0.5, "", top),),
        num_cached_tokens=7 if number == 0 else 0,
        queue_seconds=0.25 if number == 0 else 0.0,
        finish_reason=FinishReason.LENGTH if last else None,
        stopped_by="x" if last else None,
    )


class Source:
    """Deltas as fast as they are taken; ``closed`` once they are closed."""

    def __init__(self, deltas: Sequence[GenerationDelta], error: Exception | None = None) -> None:
        self._deltas = deltas
        self._error = error
        self.num_taken = 0
        self.closed = False

    async def __call__(self) -> AsyncGenerator[GenerationDelta, None]:
        try:
            for each in self._deltas:
                await asyncio.sleep(0)
                self.num_taken += 1
                yield each
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


async def settle() -> None:
    for _ in range(5000):
        await asyncio.sleep(0)


async def test_the_source_is_read_to_its_end_though_nobody_reads() -> None:
    seen: list[GenerationDelta] = []
    deltas = [delta(i, last=i == 999) for i in range(1000)]
    source = Source(deltas)
    async with OutputBuffer(seen.append).running(source()) as buffer:
        await settle()
        assert (source.num_taken, source.closed) == (1000, True)
        assert seen == deltas
        received = [each async for each in buffer]
    assert len(received) == 1
    assert received[0].token_ids == tuple(range(1000))
    assert received[0].text == "".join(each.text for each in deltas)
    assert (received[0].num_cached_tokens, received[0].queue_seconds) == (7, 0.25)
    assert (received[0].finish_reason, received[0].stopped_by) == (FinishReason.LENGTH, "x")


async def test_messages_stay_small_however_much_was_merged() -> None:
    source = Source([delta(i, num_top=20) for i in range(1000)])
    async with OutputBuffer(lambda _: None).running(source()) as buffer:
        await settle()
        received = [each async for each in buffer]
    assert len(received) < 10
    assert max(len(each.scores) for each in received) * 22 <= 4096
    assert [i for each in received for i in each.token_ids] == list(range(1000))
    assert [score.token_id for each in received for score in each.scores] == list(range(1000))


async def test_a_client_that_keeps_up_gets_every_step() -> None:
    opened = asyncio.Event()

    async def slow() -> AsyncGenerator[GenerationDelta, None]:
        for i in range(10):
            await opened.wait()
            opened.clear()
            yield delta(i)

    async with OutputBuffer(lambda _: None).running(slow()) as buffer:
        for i in range(10):
            opened.set()
            assert (await anext(buffer)).token_ids == (i,)


async def test_what_came_before_an_error_is_delivered_first() -> None:
    source = Source([delta(0), delta(1)], EngineDead("killed"))
    async with OutputBuffer(lambda _: None).running(source()) as buffer:
        await settle()
        assert (await anext(buffer)).token_ids == (0, 1)
        with pytest.raises(EngineDead):
            await anext(buffer)


async def test_leaving_closes_the_source() -> None:
    source = Source([delta(i) for i in range(10**6)])
    async with OutputBuffer(lambda _: None).running(source()) as buffer:
        await anext(buffer)
    assert source.closed
    assert source.num_taken < 10**6


async def test_a_client_that_leaves_too_much_unread_loses_its_stream() -> None:
    source = Source([delta(i, num_top=3) for i in range(10**6)])
    async with OutputBuffer(lambda _: None, max_buffered_tokens=100).running(source()) as buffer:
        await settle()
        assert (source.num_taken, source.closed) == (21, True)
        with pytest.raises(Overloaded, match="105 tokens and log-probabilities unread"):
            await anext(buffer)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_any_way_of_merging_adds_up_to_the_same(cuts: list[int]) -> None:
    deltas = [delta(i, num_top=1, last=i == 9) for i in range(10)]
    bounds = sorted({0, 10, *(min(cut * 2, 10) for cut in cuts)})
    parts = []
    for start, end in itertools.pairwise(bounds):
        part = deltas[start]
        for each in deltas[start + 1 : end]:
            part = merged(part, each)
        parts.append(part)
    whole = parts[0]
    for part in parts[1:]:
        whole = merged(whole, part)
    everything = deltas[0]
    for each in deltas[1:]:
        everything = merged(everything, each)
    assert whole == everything
