"""Two clients and a bystander: what one asks for neither refuses nor holds up the others."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.depth.levels import LevelSpec
from server.rpc.access import AccessFiles
from server.rpc.client import retry_delay
from server.rpc.generated.fathom.v1 import inference_pb2
from server.serving.service_state import State
from tests.server.rpc.conftest import LEVELS, Deployment, collect, failure, message_of
from tests.server.rpc.credentials import ALICE, NOBODY, OPS, written
from tests.server.rpc.secured import Secured, secured
from tests.server.rpc.toy_engine import BOS

BOB, CAROL = NOBODY, OPS


def generation(request_id: str = "", max_tokens: int = 3) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt="Once",
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


def by(token: str) -> Sequence[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@pytest.fixture
async def three(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Secured]:
    """A server that knows alice, bob and carol; an indirect parameter sets options."""
    clients = written(
        tmp_path / "clients",
        f"alice inference {ALICE}\nbob inference {BOB}\ncarol inference {CAROL}\n",
    )
    service = getattr(request, "param", {})
    async with secured(AccessFiles(clients=clients), service=service) as deployment:
        yield deployment


async def test_two_clients_use_one_request_id_at_once(three: Secured) -> None:
    three.engine.gate.clear()
    inference = three.client.inference
    calls = [
        asyncio.ensure_future(inference.Generate(generation("mine"), metadata=by(token)))
        for token in (ALICE, BOB)
    ]
    await three.engine.until_running(2)
    error = await failure(inference.Generate(generation("mine"), metadata=by(ALICE)))
    assert "an id that no running request has" in message_of(error)
    three.engine.gate.set()
    for response in await asyncio.gather(*calls):
        assert response.prompt_info.request_id == "mine"
    ids = [each.request_id for each in three.engine.requests]
    assert len(set(ids)) == 2
    assert not any("mine" in each for each in ids)


@pytest.mark.parametrize("three", [{"max_waiting": 2, "max_running": 8}], indirect=True)
@pytest.mark.parametrize("kind", ["Score", "Generate"])
async def test_what_runs_does_not_count_as_waiting(three: Secured, kind: str) -> None:
    three.engine.gate.clear()
    inference = three.client.inference
    requests = {"Score": inference_pb2.ScoreRequest(text="abc"), "Generate": generation()}
    calls = []
    for number in range(1, 7):
        call = getattr(inference, kind)(requests[kind], metadata=by(ALICE))
        calls.append(asyncio.ensure_future(call))
        await three.engine.until_running(number)
    newcomer = asyncio.ensure_future(inference.Generate(generation(), metadata=by(BOB)))
    await three.engine.until_running(7)
    three.engine.gate.set()
    await asyncio.gather(newcomer, *calls)


@pytest.mark.parametrize("three", [{"max_waiting": 2, "max_running": 1}], indirect=True)
async def test_scores_that_wait_give_way(three: Secured) -> None:
    three.engine.gate.clear()
    inference = three.client.inference
    score = inference_pb2.ScoreRequest(text="abc")
    runs = asyncio.ensure_future(inference.Score(score, metadata=by(ALICE)))
    await three.engine.until_running(1)
    waiting = []
    for number in (1, 2):
        waiting.append(asyncio.ensure_future(inference.Score(score, metadata=by(ALICE))))
        while three.service.status().load.num_waiting != number:
            await asyncio.sleep(0.01)
    newcomer = asyncio.ensure_future(inference.Score(score, metadata=by(BOB)))
    error = await failure(waiting[1])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message_of(error) == "the queue is full, and its places are shared among clients"
    assert retry_delay(error) == 1.0
    three.engine.gate.set()
    await asyncio.gather(runs, waiting[0], newcomer)


class SlowTokenizer:
    """Holds the tokenizer's thread until it is told to go on, in the order of ``seen``."""

    def __init__(self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.seen: list[str] = []
        monkeypatch.setattr(deployment.engine, "tokenize", self._tokenize)

    def _tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        self.seen.append(text)
        assert self.go_on.wait(60)
        return [BOS, *text.encode()]

    async def until_seen(self, number: int) -> None:
        while len(self.seen) < number:
            await asyncio.sleep(0.01)


def tokenization(text: str) -> inference_pb2.TokenizeRequest:
    return inference_pb2.TokenizeRequest(text=text)


async def test_tokenizing_is_shared_among_clients(
    three: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SlowTokenizer(three, monkeypatch)
    calls = []
    for token, text in ((ALICE, "a0"), (ALICE, "a1"), (ALICE, "a2"), (BOB, "b0")):
        call = three.client.inference.Tokenize(tokenization(text), metadata=by(token))
        calls.append(asyncio.ensure_future(call))
        while three.service._admission.num_in_flight != len(calls):
            await asyncio.sleep(0.01)
    await tokenizer.until_seen(1)
    tokenizer.go_on.set()
    await asyncio.gather(*calls)
    assert tokenizer.seen == ["a0", "b0", "a1", "a2"]


async def test_tokenizing_ends_with_its_call_and_its_deadline(
    three: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SlowTokenizer(three, monkeypatch)
    inference = three.client.inference
    first = asyncio.ensure_future(inference.Tokenize(tokenization("first"), metadata=by(ALICE)))
    await tokenizer.until_seen(1)
    late = inference.Generate(generation(), timeout=0.3, metadata=by(ALICE))
    error = await failure(late)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gone = inference.Tokenize(tokenization("gone"), metadata=by(ALICE))
    while three.service._admission.num_in_flight != 2:
        await asyncio.sleep(0.01)
    gone.cancel()
    while three.service._admission.num_in_flight != 1:
        await asyncio.sleep(0.01)
    tokenizer.go_on.set()
    await first
    bystander = await inference.Tokenize(tokenization("bystander"), metadata=by(BOB))
    assert bystander.ids
    assert tokenizer.seen == ["first", "bystander"]


@pytest.mark.parametrize("three", [{"max_waiting": 3}], indirect=True)
async def test_tokenizing_that_waits_gives_way(
    three: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SlowTokenizer(three, monkeypatch)
    inference = three.client.inference
    calls = []
    for text in ("a0", "a1", "a2"):
        call = inference.Tokenize(tokenization(text), metadata=by(ALICE))
        calls.append(asyncio.ensure_future(call))
        while three.service._admission.num_in_flight != len(calls):
            await asyncio.sleep(0.01)
    newcomer = asyncio.ensure_future(inference.Tokenize(tokenization("b0"), metadata=by(BOB)))
    error = await failure(calls[2])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    tokenizer.go_on.set()
    await asyncio.gather(*calls[:2], newcomer)
    assert tokenizer.seen == ["a0", "b0", "a1"]


async def test_a_request_that_fails_in_two_engines_is_named(
    three: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    three.engine.gate.clear()
    call = three.client.inference.Score(
        inference_pb2.ScoreRequest(request_id="poison", text="secret"), metadata=by(ALICE)
    )
    guilty = asyncio.ensure_future(call)
    await three.engine.until_running(1)
    three.engine.die()
    assert await three.service.state_after(State.SERVING) is State.ENGINE_DOWN
    assert await three.service.state_after(State.ENGINE_DOWN) is State.SERVING
    await three.engine.until_running(1)
    three.engine.die()
    error = await failure(guilty)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    while three.service.state is not State.SERVING:
        await three.service.state_after(three.service.state)
    three.engine.gate.set()
    assert (await three.client.inference.Generate(generation(), metadata=by(BOB))).text
    (record,) = [each for each in caplog.records if each.name == "server.serving.attempts"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        "request poison of client alice was running in 2 engines when they died: it is the "
        "likely cause, and is not run again"
    )
    assert "secret" not in caplog.text


@pytest.mark.parametrize("starting", [{"max_running": 2}], indirect=True)
async def test_the_engine_is_given_more_when_levels_get_engines(deployment: Deployment) -> None:
    service, engine = deployment.service, deployment.engine
    # As a dedicated engine is served: an engine of its own for each depth of a level.
    service._in_force.install(replace(service.policy, any_depth=False, levels=LEVELS[:1]))

    async def running(num_levels: int) -> int:
        specs = [LevelSpec(f"level{i}", 8 - i) for i in range(num_levels)]
        with service.updating() as updates:
            await updates.set_levels(specs)
        engine.gate.clear()
        calls: list[Any] = [
            asyncio.ensure_future(collect(deployment.client.inference.GenerateStream(generation())))
            for _ in range(10)
        ]
        await engine.until_running(2 * num_levels)
        while service.status().load.num_waiting != 10 - 2 * num_levels:
            await asyncio.sleep(0.01)
        found = engine.load().num_running
        engine.gate.set()
        await asyncio.gather(*calls)
        return found

    assert [await running(number) for number in (1, 3, 2)] == [2, 6, 4]
