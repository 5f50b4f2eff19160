"""Requests that make no sense: each is refused with a reason, and the server goes on serving."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.rpc.generated.fathom.v1 import inference_pb2
from tests.fuzz.messages import REQUESTS, request_from
from tests.fuzz.target import check_raw, check_structured
from tests.server.rpc.conftest import Deployment, deployment, starting

__all__ = ["deployment", "starting"]  # fixtures

# What a client may be told of its own mistakes.
PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHODS = {
    "GenerateRequest": "Inference/Generate",
    "ScoreRequest": "Inference/Score",
    "TokenizeRequest": "Inference/Tokenize",
    "SetLevelsRequest": "Control/SetLevels",
    "SetPolicyRequest": "Control/SetPolicy",
}
NUM_CALLS = 600
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@given(st.binary(max_size=400))
@settings(max_examples=1500)
def test_messages_are_accepted_or_refused(data: bytes) -> None:
    check_structured(data)


@given(st.binary(max_size=100))
@example(b"\n\xff\xff\xff\xff\x0f")
@settings(max_examples=500)
def test_bytes_are_accepted_or_refused(data: bytes) -> None:
    check_raw(data)


def test_cases_lead_to_messages_of_every_kind_and_to_both_ends() -> None:
    """Otherwise the tests above might try nothing that matters."""
    rng = random.Random(1)
    kinds: Counter[str] = Counter()
    accepted: Counter[bool] = Counter()
    for _ in range(3000):
        data = rng.randbytes(300)
        kinds[type(request_from(data)).__name__] += 1
        accepted[check_structured(data)] += 1
    assert set(kinds) == {kind.__name__ for kind in REQUESTS}
    assert min(accepted[True], accepted[False]) > 300


async def test_a_server_answers_any_request_properly(deployment: Deployment) -> None:
    rng = random.Random(2)
    codes: Counter[grpc.StatusCode] = Counter()
    async with grpc.aio.insecure_channel(deployment.address) as channel:

        async def call(case: int) -> None:
            request = request_from(rng.randbytes(rng.randrange(300)))
            method = METHODS.get(type(request).__name__)
            if method is None:
                return
            data = request.SerializeToString()
            if case % 3 == 0:
                data = rng.randbytes(rng.randrange(100))
            raw: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                f"/fathom.v1.{method}"
            )
            call = raw(data, timeout=60)
            code = await call.code()
            codes[code] += 1
            assert code in PROPER, (method, data, code, await call.details())
            assert code is grpc.StatusCode.OK or await call.details()

        for start in range(0, NUM_CALLS, 50):
            await asyncio.gather(*[call(case) for case in range(start, start + 50)])
    assert codes[grpc.StatusCode.OK] > 20
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 100
    assert_no_trouble(deployment)
    await assert_serves(deployment)


@pytest.fixture
async def connections(
    deployment: Deployment,
) -> AsyncIterator[list[asyncio.StreamWriter]]:
    opened: list[asyncio.StreamWriter] = []
    yield opened
    for writer in opened:
        writer.close()


async def test_any_bytes_on_the_port(
    deployment: Deployment, connections: list[asyncio.StreamWriter]
) -> None:
    rng = random.Random(3)

    async def send(case: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", deployment.rpc.port)
        connections.append(writer)
        data = rng.randbytes(rng.randrange(1, 2000))
        if case % 2:
            # As far as frames: their length, type, flags and stream.
            frames = [
                rng.randrange(64).to_bytes(3, "big")
                + bytes([rng.randrange(12), rng.randrange(256)])
                + rng.randrange(8).to_bytes(4, "big")
                + rng.randbytes(rng.randrange(64))
                for _ in range(8)
            ]
            data = PREFACE + bytes(3) + b"\x04\0" + bytes(4) + b"".join(frames)
        writer.write(data)
        try:
            await writer.drain()
            if case % 5:
                writer.write_eof()
        except (ConnectionError, OSError):
            pass  # the server has had enough

    for start in range(0, 300, 50):
        await asyncio.gather(*[send(case) for case in range(start, start + 50)])
    await assert_serves(deployment)
    assert_no_trouble(deployment)


def assert_no_trouble(deployment: Deployment) -> None:
    assert deployment.engine.is_alive
    assert deployment.engine.load().num_running == 0
    assert deployment.service.status().load.num_waiting == 0


async def assert_serves(deployment: Deployment) -> None:
    response = await deployment.client.inference.Generate(
        inference_pb2.GenerateRequest(
            prompt="Once", stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True)
        )
    )
    assert response.finish_info.usage.num_generated_tokens == 3
