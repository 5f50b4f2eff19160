"""More requests than the engine takes, prompts that are long, and clients that do not read."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from server.rpc.client import AsyncClient, retry_delay
from server.rpc.generated.fathom.v1 import inference_pb2, inference_pb2_grpc
from tests.server.rpc.conftest import Deployment, collect, failure, message_of
from tests.server.rpc.toy_engine import expected_tokens


def request(max_tokens: int = 3, prompt: str = "Once") -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=prompt,
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(token_ids=True),
    )


@pytest.mark.parametrize("starting", [{"max_running": 4}], indirect=True)
async def test_the_engine_is_given_as_many_as_it_runs(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    calls = [
        asyncio.ensure_future(deployment.client.inference.Generate(request())) for _ in range(20)
    ]
    await deployment.engine.until_running(4)
    while await deployment.metric("fathom_requests_waiting") != 16:
        await asyncio.sleep(0.01)
    assert await deployment.metric("fathom_requests_running") == 4
    assert len(deployment.engine.requests) == 4
    deployment.engine.gate.set()
    for response in await asyncio.gather(*calls):
        assert response.finish_info.usage.num_generated_tokens == 3
    assert deployment.engine.max_running == 4


@pytest.mark.parametrize("starting", [{"max_running": 2}], indirect=True)
async def test_a_deadline_that_passes_in_the_queue(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    streams = [deployment.client.inference.GenerateStream(request()) for _ in range(2)]
    await deployment.engine.until_running(2)
    error = await failure(deployment.client.inference.Generate(request(), timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # The client knows by its own clock; the server may hear of it later.
    while await deployment.metric("fathom_requests_waiting") != 0:
        await asyncio.sleep(0.01)
    deployment.engine.gate.set()
    for stream in streams:
        await collect(stream)
    assert (await deployment.client.inference.Generate(request())).HasField("finish_info")
    assert len(deployment.engine.requests) == 3


@pytest.mark.parametrize("starting", [{"max_running": 1, "max_waiting": 1000}], indirect=True)
async def test_a_deadline_that_cannot_be_met_is_told_at_once(deployment: Deployment) -> None:
    inference = deployment.client.inference
    deployment.engine.gate.clear()
    calls = [asyncio.ensure_future(inference.Generate(request(1))) for _ in range(400)]
    while await deployment.metric("fathom_requests_waiting") != 399:
        await asyncio.sleep(0.01)
    # One request every 10 ms, so that some seconds pass until a new one can start.
    for _ in range(40):
        deployment.engine.gate.set()
        started = len(deployment.engine.requests)
        while len(deployment.engine.requests) == started:
            await asyncio.sleep(0)
        deployment.engine.gate.clear()
        await asyncio.sleep(0.01)
    error = await failure(inference.Generate(request(), timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "the requests before this one take" in message_of(error)
    deployment.engine.gate.set()
    await asyncio.gather(*calls)
    assert (await inference.Generate(request(), timeout=30)).HasField("finish_info")


@pytest.mark.parametrize("starting", [{"max_waiting_tokens": 100}], indirect=True)
async def test_prompts_that_wait_are_limited(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    stream = deployment.client.inference.GenerateStream(request(prompt="a" * 89))
    await deployment.engine.until_running(1)
    error = await failure(deployment.client.inference.Generate(request(prompt="b" * 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message_of(error) == (
        "90 prompt tokens wait, and max_waiting_tokens allows 100; try again"
    )
    assert retry_delay(error) == 1.0
    small = asyncio.ensure_future(deployment.client.inference.Generate(request(prompt="b")))
    await deployment.engine.until_running(2)
    deployment.engine.gate.set()
    await collect(stream)
    await small
    assert (await deployment.client.inference.Generate(request(prompt="b" * 400))).text


async def test_a_client_that_does_not_read_holds_nothing_up_and_loses_nothing(
    deployment: Deployment, narrow_stub: inference_pb2_grpc.InferenceStub
) -> None:
    asked = request(600)
    asked.output.logprobs = 20
    slow = [narrow_stub.GenerateStream(asked) for _ in range(4)]
    for stream in slow:
        assert (await stream.read()).HasField("prompt_info")
    async with AsyncClient(deployment.address) as other:
        brisk = await collect(other.inference.GenerateStream(request(500)))
    assert brisk[-1].HasField("finish_info")
    # The engine is done with all of them, though nothing was read.
    while deployment.engine.load().num_running:
        await asyncio.sleep(0.01)
    assert deployment.service.status().load.num_waiting == 0
    (layers,) = {each.layers for each in deployment.engine.requests}
    expected = expected_tokens(deployment.engine.requests[0].prompt_ids, layers, 600)
    for stream in slow:
        messages = await rest_of(stream)
        assert messages[-1].HasField("finish_info")
        assert len(messages) < 600
        token_ids = [i for message in messages for i in message.delta.token_ids]
        assert token_ids == expected
        assert max(message.ByteSize() for message in messages) < 2**20


@pytest.mark.parametrize("starting", [{"max_buffered_tokens": 5000}], indirect=True)
async def test_a_client_that_leaves_too_much_unread_loses_its_stream(
    deployment: Deployment, narrow_stub: inference_pb2_grpc.InferenceStub
) -> None:
    asked = request(1000)
    asked.output.logprobs = 20
    slow = narrow_stub.GenerateStream(asked)
    assert (await slow.read()).HasField("prompt_info")
    await deployment.engine.until_running(1)
    await deployment.engine.until_running(0)
    assert deployment.engine.freed == [deployment.engine.requests[0].request_id]
    error = await failure(rest_of(slow))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "and max_buffered_tokens allows 5000" in message_of(error)
    # A client that reads may have as much.
    asked.stop.max_tokens = 300
    assert (await deployment.client.inference.Generate(asked)).HasField("finish_info")


async def rest_of(
    stream: grpc.aio.UnaryStreamCall[
        inference_pb2.GenerateRequest, inference_pb2.GenerateStreamResponse
    ],
) -> list[inference_pb2.GenerateStreamResponse]:
    messages: list[inference_pb2.GenerateStreamResponse] = []
    while (message := await stream.read()) is not grpc.aio.EOF:
        messages.append(message)  # type: ignore[arg-type]
    return messages
