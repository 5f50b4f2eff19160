"""Calls that end before their answer does: the engine is freed."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from server.rpc.generated.fathom.v1 import inference_pb2, inference_pb2_grpc
from tests.server.rpc.conftest import Deployment, failure

METHOD = "fathom.v1.Inference/"


def request(request_id: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt="Once",
        stop=inference_pb2.StopConditions(max_tokens=4000, ignore_eos=True),
    )


async def assert_freed(deployment: Deployment, method: str, code: str) -> None:
    await deployment.engine.until_freed()
    await deployment.engine.until_running(0)
    labels = {"method": METHOD + method, "depth": "8", "code": code}
    while await deployment.metric("fathom_requests_total", **labels) is None:
        await asyncio.sleep(0.01)
    assert await deployment.metric("fathom_requests_total", **labels) == 1
    # The id is free again, and so is the place.
    deployment.engine.gate.set()
    sound = request("mine")
    sound.stop.max_tokens = 2
    response = await deployment.client.inference.Generate(sound)
    assert response.finish_info.usage.num_generated_tokens == 2


async def test_cancelled_unary_call(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.inference.Generate(request("mine"))
    await deployment.engine.until_running(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await assert_freed(deployment, "Generate", "CANCELLED")


async def test_cancelled_stream(deployment: Deployment) -> None:
    call = deployment.client.inference.GenerateStream(request("mine"))
    assert (await call.read()).HasField("prompt_info")
    assert (await call.read()).HasField("delta")
    deployment.engine.gate.clear()
    await deployment.engine.until_running(1)
    call.cancel()
    await assert_freed(deployment, "GenerateStream", "CANCELLED")


async def test_cancelled_while_the_server_waits_for_a_slow_reader(
    deployment: Deployment, narrow_stub: inference_pb2_grpc.InferenceStub
) -> None:
    asked = request("mine")
    asked.stop.max_tokens = 600
    asked.output.logprobs = 20
    call = narrow_stub.GenerateStream(asked)
    await call.read()
    # The engine does not wait for the reader, whose messages do.
    while deployment.engine.num_steps < 600 or deployment.engine.load().num_running:
        await asyncio.sleep(0.05)
    error = await failure(deployment.client.inference.Generate(request("mine")))
    assert "an id that no running request has" in (error.details() or "")
    call.cancel()
    labels = {"method": f"{METHOD}GenerateStream", "depth": "8", "code": "CANCELLED"}
    while await deployment.metric("fathom_requests_total", **labels) != 1:
        await asyncio.sleep(0.01)
    sound = request("mine")
    sound.stop.max_tokens = 2
    assert (await deployment.client.inference.Generate(sound)).HasField("finish_info")


async def test_lost_connection(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    channel = grpc.aio.insecure_channel(deployment.address)
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        f"/{METHOD}Generate"
    )
    call = method(request("mine").SerializeToString())
    await deployment.engine.until_running(1)
    await channel.close()
    assert call.done()
    await assert_freed(deployment, "Generate", "CANCELLED")


async def test_deadline_of_a_unary_call(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    error = await failure(deployment.client.inference.Generate(request("mine"), timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_freed(deployment, "Generate", "DEADLINE_EXCEEDED")


async def test_deadline_of_a_stream(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.inference.GenerateStream(request("mine"), timeout=0.5)
    assert (await call.read()).HasField("prompt_info")
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_freed(deployment, "GenerateStream", "DEADLINE_EXCEEDED")


async def test_cancelled_score(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.inference.Score(
        inference_pb2.ScoreRequest(request_id="mine", text="abc")
    )
    await deployment.engine.until_running(1)
    call.cancel()
    await deployment.engine.until_freed()
    await deployment.engine.until_running(0)
