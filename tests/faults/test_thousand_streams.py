"""A thousand streams at mixed depths, all open at once, of a real server with a real engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest

from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import control_pb2
from server.serving.fair_queue import slots_for
from tests.e2e.calls import at_once, greedy_request
from tests.e2e.running_server import RunningServer
from tests.e2e.watcher import Watcher
from tests.faults.outcomes import Asked, Crowd, Outcome

NUM_STREAMS = 1000
NUM_TOKENS = 24
DEPTHS = (16, 13, 9, 6, 4, 2, 1)
PROMPTS = ("The list", "Return the", "An object", "If the argument", "See also")
NUM_RUNNING = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Nothing kills its engine for being silent: it is silent while the streams arrive."""
    server = RunningServer(
        tmp_path_factory.mktemp("thousand"),
        max_num_seqs=NUM_RUNNING,
        engine_timeout_seconds=0,
        quality_depths="levels",
    )
    try:
        server.wait_until_serving()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def streams(server: RunningServer) -> list[Asked]:
    kinds = [(prompt, depth) for prompt in PROMPTS for depth in DEPTHS]
    with server.client() as client:
        answers = at_once(
            lambda kind: client.generate(greedy_request(kind[0], NUM_TOKENS, depth=kind[1])), kinds
        )
    expected = {kind: tuple(a.token_ids) for kind, a in zip(kinds, answers, strict=True)}
    assert len(set(expected.values())) > len(kinds) // 2  # or mistaken ones would not show
    return [
        Asked(
            greedy_request(prompt, NUM_TOKENS, depth=depth), expected[prompt, depth], is_stream=True
        )
        for i in range(NUM_STREAMS)
        for prompt, depth in [kinds[i % len(kinds)]]
    ]


async def send_all(
    server: RunningServer, engine: psutil.Process, streams: list[Asked], fault: Callable[[], None]
) -> Counter[Outcome]:
    """Have all streams open before the engine's first step, and inject the fault after some."""
    async with AsyncClient(server.address) as client:
        crowd = Crowd(client)
        engine.suspend()
        sending = asyncio.create_task(crowd.send(streams, fault, after=20))
        while True:
            status = await client.control.GetStatus(control_pb2.GetStatusRequest())
            if crowd.num_admitted + status.num_waiting == len(streams):
                break
            assert not sending.done()
            await asyncio.sleep(0.05)
        engine.resume()
        outcomes = await sending
        print(dict(outcomes))
        assert crowd.problems == []
    return outcomes


def test_all_are_answered(server: RunningServer, streams: list[Asked]) -> None:
    (engine,) = server.engine_processes()
    outcomes = asyncio.run(send_all(server, engine, streams, lambda: None))
    assert outcomes == {Outcome.ANSWERED: NUM_STREAMS}


def test_none_is_lost_when_the_engine_is_killed(
    server: RunningServer, streams: list[Asked]
) -> None:
    (engine,) = server.engine_processes()
    with Watcher(server.address) as watcher:
        watcher.wait_for("SERVING")
        outcomes = asyncio.run(send_all(server, engine, streams, engine.kill))
        watcher.wait_for("SERVING", "NOT_SERVING", "SERVING")
    # What the engine was at ends; what waited is answered by the next one.
    assert 0 < outcomes[Outcome.REFUSED] <= slots_for(NUM_RUNNING)
    assert outcomes[Outcome.ANSWERED] + outcomes[Outcome.REFUSED] == NUM_STREAMS
    (again,) = server.engine_processes()
    again_outcomes = asyncio.run(send_all(server, again, streams[:40], lambda: None))
    assert again_outcomes == {Outcome.ANSWERED: 40}
    assert server.scrape().value("fathom_requests_running") == 0
