"""The synchronous client, as the command line uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from tests.server.rpc.conftest import Deployment

T = TypeVar("T")


async def use(deployment: Deployment, function: Callable[[Client], T]) -> T:
    def run() -> T:
        with Client(deployment.address, timeout=30) as client:
            return function(client)

    return await asyncio.to_thread(run)


def request(max_tokens: int = 3) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id="mine",
        prompt="Once",
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )


async def test_every_method(deployment: Deployment) -> None:
    def calls(client: Client) -> None:
        assert client.health() == "SERVING"
        assert client.health("fathom.v1.Control") == "SERVING"
        assert client.get_model().num_layers == 8
        text = client.generate(request()).text
        messages = list(client.generate_stream(request()))
        assert "".join(message.delta.text for message in messages) == text
        assert len(client.score(inference_pb2.ScoreRequest(text="abc")).logprobs) == 3
        assert len(client.tokenize(inference_pb2.TokenizeRequest(text="abc")).ids) == 4
        *_, last = client.calibrate(control_pb2.CalibrateRequest())
        assert client.get_plan().plan == last.plan
        spec = control_pb2.LevelSpec(name="thin")
        spec.depth.layers = 2
        assert client.set_levels(control_pb2.SetLevelsRequest(levels=[spec])).levels[0].is_default
        policy = control_pb2.Policy(level="thin")
        assert client.set_policy(control_pb2.SetPolicyRequest(policy=policy)).policy.level == "thin"
        assert client.get_status().state == control_pb2.GetStatusResponse.STATE_SERVING
        assert client.drain(control_pb2.DrainRequest()).num_unfinished == 0
        assert client.health() == "NOT_SERVING"

    await use(deployment, calls)


async def test_errors(deployment: Deployment) -> None:
    def calls(client: Client) -> None:
        with pytest.raises(CallError) as caught:
            client.generate(request(max_tokens=0))
        assert caught.value.code == "INVALID_ARGUMENT"
        assert caught.value.message == "stop.max_tokens: got 0, allowed: 1 or more"
        assert caught.value.retry_after is None
        client.drain(control_pb2.DrainRequest())
        with pytest.raises(CallError) as caught:
            next(client.generate_stream(request()))
        assert caught.value.code == "UNAVAILABLE"
        assert caught.value.retry_after == 1.0

    await use(deployment, calls)


async def test_nobody_listens() -> None:
    def call() -> None:
        with Client("127.0.0.1:1", timeout=30) as client, pytest.raises(CallError) as caught:
            client.get_model()
        assert caught.value.code == "UNAVAILABLE"

    await asyncio.to_thread(call)


async def test_closing_the_stream_cancels_the_request(deployment: Deployment) -> None:
    def calls(client: Client) -> None:
        stream = client.generate_stream(request(4000))
        assert next(stream).HasField("prompt_info")
        assert next(stream).HasField("delta")
        stream.close()  # type: ignore[attr-defined]

    await use(deployment, calls)
    await deployment.engine.until_freed()
