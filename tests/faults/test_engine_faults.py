"""A real server under load whose engine dies or hangs, and which is killed itself."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2_grpc
from tests.e2e.calls import LONG, at_once, failure, greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, measurements_in
from tests.e2e.test_life import SMALL_WINDOW
from tests.e2e.watcher import Watcher
from tests.faults.outcomes import Asked, Crowd, Outcome

NUM_REQUESTS = 300
NUM_TOKENS = 64
DEPTHS = (16, 11, 6, 2)
PROMPTS = ("The list", "Return the", "An object", "If the argument", "See also")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Its queue outlives the engine: it runs 64 of the 300 requests at a time."""
    server = RunningServer(tmp_path_factory.mktemp("faults"))
    try:
        server.wait_until_serving()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def crowd(server: RunningServer) -> list[Asked]:
    """Streams, and one unary call in four, each with the expected answer."""
    kinds = [(prompt, depth) for prompt in PROMPTS for depth in DEPTHS]
    with server.client() as client:
        answers = at_once(
            lambda kind: client.generate(greedy_request(kind[0], NUM_TOKENS, depth=kind[1])), kinds
        )
    expected = {kind: tuple(a.token_ids) for kind, a in zip(kinds, answers, strict=True)}
    return [
        Asked(
            greedy_request(prompt, NUM_TOKENS, depth=depth),
            expected[prompt, depth],
            is_stream=i % 4 > 0,
        )
        for i in range(NUM_REQUESTS)
        for prompt, depth in [kinds[i % len(kinds)]]
    ]


def survive(server: RunningServer, crowd: list[Asked], fault: Callable[[], None]) -> None:
    """Inject the fault and check how everything ends, and that all is well afterwards."""
    at = 0.0

    def timed_fault() -> None:
        nonlocal at
        at = time.monotonic()
        fault()

    async def run() -> tuple[Counter[Outcome], list[str], Counter[Outcome]]:
        async with AsyncClient(server.address) as client:
            senders = Crowd(client)
            outcomes = await senders.send(crowd, timed_fault, after=20)
            problems = list(senders.problems or ())
            await asyncio.to_thread(watcher.wait_for, "SERVING", "NOT_SERVING", "SERVING")
            again = await senders.send(crowd[:40], lambda: None, after=0)
        return outcomes, problems, again

    restarts = server.scrape().value("fathom_engine_restarts_total")
    with Watcher(server.address) as watcher:
        watcher.wait_for("SERVING")
        outcomes, problems, again = asyncio.run(run())
        down, up = (when - at for when in watcher.times[1:])
    print(f"{outcomes}; {down:.1f} s to NOT_SERVING, {up:.1f} s to SERVING")
    assert problems == []
    assert set(outcomes) == {Outcome.ANSWERED, Outcome.REFUSED}
    assert again == {Outcome.ANSWERED: 40}
    scrape = server.scrape()
    assert scrape.value("fathom_engine_restarts_total") == restarts + 1
    assert scrape.value("fathom_requests_running") == 0
    assert scrape.sum("fathom_requests_total", code="INTERNAL") == 0


def test_a_killed_engine(server: RunningServer, crowd: list[Asked]) -> None:
    """The kernel kills an engine in this way when memory has run out."""
    (engine,) = server.engine_processes()
    survive(server, crowd, engine.kill)


def test_an_engine_that_hangs(server: RunningServer, crowd: list[Asked]) -> None:
    (engine,) = server.engine_processes()
    survive(server, crowd, engine.suspend)
    assert re.search(r"the engine was stopped by a signal \d+ s ago; it is killed", server.log)
    assert not engine.is_running()


def test_an_engine_that_runs_out_of_memory(server: RunningServer, crowd: list[Asked]) -> None:
    (engine,) = server.engine_processes()

    def allow_no_more() -> None:
        limit = engine.memory_info().vms
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (limit, limit))

    survive(server, crowd, allow_no_more)
    assert not engine.is_running()


def test_a_killed_server(server: RunningServer, crowd: list[Asked], tmp_path: Path) -> None:
    """The next one begins with its settings, and measures nothing again."""
    with server.client() as client:
        request = control_pb2.SetLevelsRequest()
        request.levels.add(name="third").depth.layers = 5
        client.set_levels(request)
        assert [level.name for level in client.get_model().levels] == ["third"]
    assert "levels: third=5; the default is third; set by 127.0.0.1, until this" in server.log

    async def run() -> tuple[Counter[Outcome], list[str]]:
        async with AsyncClient(server.address) as client:
            senders = Crowd(client, expects_retry_info=False)
            outcomes = await senders.send(
                crowd, lambda: os.kill(server.process.pid, signal.SIGKILL), after=20
            )
            return outcomes, list(senders.problems or ())

    outcomes, problems = asyncio.run(run())
    assert problems == []
    assert outcomes[Outcome.REFUSED] > 0
    assert set(outcomes) <= {Outcome.ANSWERED, Outcome.REFUSED}
    again = RunningServer(tmp_path, state_dir=server.state_directory)
    try:
        again.wait_until_serving()
        assert measurements_in(again.log) == []
        assert "levels, as the settings have them: dense=16, balanced=12, fast=8" in again.log
        with again.client() as client:
            levels = client.get_model().levels
            assert [level.name for level in levels] == ["dense", "balanced", "fast", "turbo"]
            asked = crowd[0]
            assert tuple(client.generate(asked.request).token_ids) == asked.expected
        end_twice(again)
    finally:
        again.close()


def end_twice(server: RunningServer) -> None:
    """The first signal lets a request finish, the second does not."""
    children = server.children()
    with (
        Watcher(server.address) as watcher,
        grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel,
    ):
        watcher.wait_for("SERVING")
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        request = greedy_request("The list", LONG)
        request.output.logprobs = 20
        stream = stub.GenerateStream(request)
        assert next(stream).HasField("prompt_info")
        server.process.terminate()
        watcher.wait_for("SERVING", "NOT_SERVING")
        with server.client() as client:
            refused = failure(lambda: client.generate(greedy_request("The list", 3)))
        assert (refused.code, refused.retry_after) == ("UNAVAILABLE", 1.0)
        assert server.process.poll() is None
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
