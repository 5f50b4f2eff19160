"""Loads on a generator of tokens that needs no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from bench.load import Load, Timeline, closed_loop, open_loop, steady_loop
from bench.statistics import Percentiles
from bench.workload import Request


class Recorder:
    """Generates what it is asked for, and keeps in which order requests came and went."""

    def __init__(self, *, broken: bool = False) -> None:
        self.log: list[str] = []
        self.running = self.most_running = 0
        self._broken = broken

    async def generate(self, request: Request) -> AsyncIterator[int]:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        name = str(request.prompt_ids[0])
        self.log.append(f"+{name}")
        try:
            yield 0  # a message without tokens, as the first one of a stream is
            for _ in range(request.num_tokens - self._broken):
                await asyncio.sleep(0)
                yield 1
        finally:
            self.log.append(f"-{name}")
            self.running -= 1


def requests(*names: int, num_tokens: int = 3) -> list[Request]:
    return [Request((name,), num_tokens) for name in names]


async def test_a_stream_of_a_closed_loop_waits_for_its_last_request() -> None:
    recorder = Recorder()
    load = await closed_loop(recorder.generate, [requests(1, 2), requests(3, 4)])
    assert recorder.most_running == 2
    assert recorder.log.index("-1") < recorder.log.index("+2")
    assert recorder.log.index("-3") < recorder.log.index("+4")
    assert load.num_tokens == 12
    assert [timeline.num_tokens for timeline in load.timelines] == [3, 3, 3, 3]


async def test_an_open_loop_does_not_wait() -> None:
    recorder = Recorder()
    load = await open_loop(recorder.generate, requests(*range(8)), [0.0] * 8)
    assert recorder.most_running == 8
    assert load.num_tokens == 24


async def test_a_request_is_late_by_what_it_waited_before_it_was_sent() -> None:
    load = await open_loop(Recorder().generate, requests(1), [-5.0])
    (timeline,) = load.timelines
    assert timeline.time_to_first_token > 5.0


async def test_wrong_numbers_of_tokens_are_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="got 2 tokens where 3"):
        await closed_loop(Recorder(broken=True).generate, [requests(1)])


async def test_a_steady_loop_keeps_all_streams_busy_and_leaves_none_behind() -> None:
    recorders = [Recorder(), Recorder()]
    loads = await steady_loop(
        [recorder.generate for recorder in recorders],
        [requests(1), requests(2, num_tokens=5)],
        0.05,
    )
    assert len(loads) == 2
    assert loads[0].begin == loads[1].begin
    assert loads[0].seconds == pytest.approx(0.05)
    for load, recorder in zip(loads, recorders, strict=True):
        assert load.num_tokens > 0
        assert recorder.running == 0
        assert recorder.log.count("+1") + recorder.log.count("+2") > 1


async def test_a_failure_ends_a_steady_loop() -> None:
    async def broken(request: Request) -> AsyncIterator[int]:
        raise ConnectionError("gone")
        yield 1

    with pytest.raises(ConnectionError):
        await steady_loop([broken, Recorder().generate], [requests(1), requests(2)], 60.0)


def test_latencies_of_a_timeline() -> None:
    timeline = Timeline(10.0, [(12.0, 1), (12.5, 1), (13.5, 2)])
    assert timeline.num_tokens == 4
    assert timeline.time_to_first_token == 2.0
    assert timeline.inter_token_latencies() == [0.5, 0.5, 0.5]


def test_only_tokens_within_the_time_count() -> None:
    load = Load((Timeline(0.0, [(0.5, 1), (1.5, 2), (2.5, 4)]),), begin=1.0, end=2.0)
    assert load.num_tokens == 2
    assert load.tokens_per_second == 2.0
    assert load.time_to_first_token() == Percentiles(0.5, 0.5, 0.5)
