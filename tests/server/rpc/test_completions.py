"""Several completions of one call."""

from __future__ import annotations

import asyncio
import subprocess

import grpc
import pytest

from server.rpc.generated.fathom.v1 import inference_pb2
from tests.fathom_command import fathom
from tests.server.rpc.conftest import Deployment, collect, failure, message_of


def request(n: int, max_tokens: int = 6, *, request_id: str = "") -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        prompt="Once",
        n=n,
        sampling=inference_pb2.SamplingParams(seed=7),
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(token_ids=True, logprobs=1),
    )


@pytest.mark.parametrize("n", [0, 1])
async def test_one_is_as_ever(deployment: Deployment, n: int) -> None:
    response = await deployment.client.inference.Generate(request(n, request_id="mine"))
    assert not response.others
    assert response.prompt_info.request_id == "mine"
    messages = await collect(deployment.client.inference.GenerateStream(request(n)))
    assert {message.index for message in messages} == {0}
    assert [each.sampling.seed for each in deployment.engine.requests] == [7, 7]


async def test_each_has_the_parts_of_a_call_of_its_own(deployment: Deployment) -> None:
    alone = await deployment.client.inference.Generate(request(1))
    del deployment.engine.requests[:]
    together = await deployment.client.inference.Generate(request(3, request_id="mine"))
    responses = [together, *together.others]
    for response in responses:
        assert (response.text, response.token_ids) == (alone.text, alone.token_ids)
        assert response.logprobs == alone.logprobs
        assert response.finish_info.usage == alone.finish_info.usage
        assert response.served == alone.served
        assert not response.others or response is together
    ids = [response.prompt_info.request_id for response in responses]
    assert ids == ["mine-0", "mine-1", "mine-2"]
    assert sorted(each.sampling.seed or 0 for each in deployment.engine.requests) == [7, 8, 9]


async def test_a_stream_has_each_by_its_index(deployment: Deployment) -> None:
    alone = await deployment.client.inference.Generate(request(1))
    messages = await collect(deployment.client.inference.GenerateStream(request(3)))
    for index in range(3):
        first, *deltas, last = [each for each in messages if each.index == index]
        assert first.HasField("prompt_info")
        assert last.finish_info.usage == alone.finish_info.usage
        assert "".join(each.delta.text for each in deltas) == alone.text
    ids = {each.prompt_info.request_id for each in messages if each.HasField("prompt_info")}
    assert len(ids) == 3
    labels = {"method": "fathom.v1.Inference/GenerateStream", "depth": "8", "code": "OK"}
    assert await deployment.metric("fathom_requests_total", **labels) == 1


async def test_too_many(deployment: Deployment) -> None:
    error = await failure(deployment.client.inference.Generate(request(129)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message_of(error) == "n: got 129, allowed: at most 128"
    assert not deployment.engine.requests


@pytest.mark.parametrize("is_stream", [False, True])
async def test_cancelling_ends_all(deployment: Deployment, is_stream: bool) -> None:
    deployment.engine.gate.clear()
    inference = deployment.client.inference
    method = inference.GenerateStream if is_stream else inference.Generate
    call = method(request(4, 4000))
    await deployment.engine.until_running(4)
    call.cancel()
    await deployment.engine.until_running(0)
    assert len(deployment.engine.freed) == 4


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("starting", [{"max_running": 1, "max_waiting": 3}], indirect=True)
async def test_one_that_is_refused_ends_all(deployment: Deployment, is_stream: bool) -> None:
    """There is room for three."""
    inference = deployment.client.inference
    if is_stream:
        error = await failure(collect(inference.GenerateStream(request(4))))
    else:
        error = await failure(inference.Generate(request(4)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await deployment.engine.until_running(0)
    while await deployment.metric("fathom_requests_waiting"):
        await asyncio.sleep(0.01)
    assert (await inference.Generate(request(3))).HasField("finish_info")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_the_death_of_the_engine_ends_all_with_one_status(
    deployment: Deployment, is_stream: bool
) -> None:
    inference = deployment.client.inference
    if is_stream:
        begun: set[int] = set()

        async def read() -> None:
            async for message in inference.GenerateStream(request(3, 4000)):
                if message.HasField("delta"):
                    begun.add(message.index)
                if len(begun) == 3 and deployment.engine.is_alive:
                    deployment.engine.die()

        error = await failure(read())
        assert begun == {0, 1, 2}
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "engine" in message_of(error)
    else:
        # Nothing has reached the client, so that all run once more.
        deployment.engine.gate.clear()
        whole = asyncio.ensure_future(inference.Generate(request(3)))
        await deployment.engine.until_running(3)
        deployment.engine.die()
        deployment.engine.gate.set()
        assert len((await whole).others) == 2


async def test_each_counts_in_the_queue(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = asyncio.ensure_future(deployment.client.inference.Generate(request(5)))
    await deployment.engine.until_running(5)
    assert await deployment.metric("fathom_requests_running") == 5
    deployment.engine.gate.set()
    response = await call
    assert await deployment.metric("fathom_generation_tokens_total", depth="8") == 30
    assert len(response.others) == 4


async def test_the_command_prints_one_after_the_other(deployment: Deployment) -> None:
    async def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = "generate", "Once", "--max-tokens", "12", "--ignore-eos", *options
        return await asyncio.to_thread(fathom, *command, FATHOM_ADDRESS=deployment.address)

    alone, together, refused = await asyncio.gather(run(), run("-n", "3"), run("-n", "129"))
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout * 3
    assert len(together.stderr.splitlines()) == 3
    assert refused.stderr == "fathom: INVALID_ARGUMENT: n: got 129, allowed: at most 128\n"
