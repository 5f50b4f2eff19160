"""What ends a request: the client, the engine, a drain, an overload."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest

from server.access.authenticator import Authenticator
from server.engine.base import GenerationDelta, GenerationRequest
from server.errors import InvalidArgument, RequestFailed
from server.openai.server import HttpServer
from tests.server.openai.conftest import HttpDeployment, ToyVllm, until_recorded
from tests.server.openai.test_completions import PROMPT, asked, text_at

BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
async def test_a_client_that_leaves_frees_the_engine(
    deployment: HttpDeployment, fields: dict[str, Any]
) -> None:
    deployment.engine.gate.clear()
    asking = asyncio.create_task(deployment.post("/v1/completions", {**BODY, **fields}))
    num_requests = fields.get("n", 1)
    await deployment.engine.until_running(num_requests)
    asking.cancel()
    await deployment.engine.until_running(0)
    assert len(deployment.engine.freed) == num_requests
    record = await until_recorded(deployment)
    assert record.code == "CANCELLED"


async def test_a_client_that_leaves_in_the_middle_of_a_stream(deployment: HttpDeployment) -> None:
    async with (
        deployment.raw() as client,
        client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 4000, "stream": True}
        ) as response,
    ):
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        deployment.engine.gate.clear()
    await deployment.engine.until_running(0)
    assert len(deployment.engine.freed) == 1
    assert (await until_recorded(deployment)).code == "CANCELLED"


async def test_the_death_of_the_engine_before_the_first_byte(deployment: HttpDeployment) -> None:
    engine = deployment.engine
    engine.gate.clear()
    streams = [
        asyncio.create_task(deployment.post("/v1/completions", {**BODY, "stream": True, "n": n}))
        for n in (1, 3)
    ]
    await engine.until_running(4)
    engine.start_gate.clear()
    engine.die()
    for asking in streams:
        response = await asking
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "started again" in response.json()["error"]["message"]
    refused = await deployment.post("/v1/completions", BODY)
    assert refused.status_code == 503, "the engine is being started"
    engine.gate.set()
    engine.start_gate.set()
    while deployment.service.state.value != "serving":
        await asyncio.sleep(0.01)
    async with deployment.openai() as client:
        answer = await client.completions.create(**asked())
    assert answer.choices[0].text == text_at(8, 8, 8), "the next engine serves"


async def test_an_answer_of_which_nothing_was_sent_is_made_by_the_next_engine(
    deployment: HttpDeployment,
) -> None:
    deployment.engine.gate.clear()
    asking = asyncio.create_task(deployment.post("/v1/completions", {**BODY, "max_tokens": 8}))
    await deployment.engine.until_running(1)
    deployment.engine.die()
    deployment.engine.gate.set()
    response = await asking
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == text_at(8, 8, 8)


async def test_the_death_of_the_engine_in_the_middle_of_a_stream(
    deployment: HttpDeployment,
) -> None:
    async with deployment.openai() as client:
        stream = await client.completions.create(**asked(max_tokens=4000, stream=True, n=2))
        await anext(stream)
        deployment.engine.gate.clear()
        deployment.engine.die()
        with pytest.raises(openai.APIError, match="the engine has died"):
            async for _ in stream:
                pass
    deployment.engine.gate.set()
    record = await until_recorded(deployment)
    assert (record.code, record.http_status) == ("UNAVAILABLE", 200)


class Failing(ToyVllm):
    """Gives up the requests for a depth of four layers, as vLLM does with bad grammars."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        async for delta in super().generate(request):
            if len(request.layers.decode_skips) == 4:
                raise RequestFailed("the engine has given up the request")
            yield delta


async def test_an_error_of_one_request_ends_that_request_alone(deployment: HttpDeployment) -> None:
    deployment.engine.__class__ = Failing
    deployment.engine.gate.clear()
    bodies = [{**BODY, "depth": depth, "stream": stream}
              for depth in (8, 4) for stream in (False, True)]  # fmt: skip
    asking = [asyncio.create_task(deployment.post("/v1/completions", body)) for body in bodies]
    await deployment.engine.until_running(4)
    deployment.engine.gate.set()
    responses = [await each for each in asking]
    assert [response.status_code for response in responses] == [200, 200, 500, 500]
    assert responses[2].json()["error"]["message"] == "the engine has given up the request"
    assert deployment.engine.num_starts == 1, "the engine lives on"


async def test_a_drain_finishes_what_runs(deployment: HttpDeployment) -> None:
    deployment.engine.gate.clear()
    asking = asyncio.create_task(
        deployment.post("/v1/completions", {**BODY, "stream": True, "max_tokens": 8})
    )
    await deployment.engine.until_running(1)
    draining = asyncio.create_task(deployment.service.drain(for_good=True))
    while deployment.service.state.value != "draining":
        await asyncio.sleep(0)
    refused = await deployment.post("/v1/completions", BODY)
    assert refused.status_code == 503
    assert "draining" in refused.json()["error"]["message"]
    deployment.engine.gate.set()
    await draining
    await deployment.http.stop()
    response = await asking
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(texts) == text_at(8, 8, 8)


@pytest.mark.parametrize(
    "starting", [{"service": {"max_running": 1, "max_waiting": 1}}], indirect=True
)
async def test_an_overloaded_server_says_when_to_try_again(deployment: HttpDeployment) -> None:
    deployment.engine.gate.clear()
    running = asyncio.create_task(deployment.post("/v1/completions", BODY))
    await deployment.engine.until_running(1)
    waiting = asyncio.create_task(deployment.post("/v1/completions", BODY))
    while not deployment.service.status().load.num_waiting:
        await asyncio.sleep(0)
    async with deployment.openai() as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="max_waiting allows") as caught:
                await client.completions.create(**asked(stream=stream))
            assert int(caught.value.response.headers["retry-after"]) >= 1
    tokenizing = await deployment.post("/tokenize", {"prompt": "a"})
    assert tokenizing.status_code == 429, "it goes through admission as well"
    deployment.engine.gate.set()
    assert [(await each).status_code for each in (running, waiting)] == [200, 200]


async def test_a_server_that_starts(starting: HttpDeployment) -> None:
    refused = await starting.post("/v1/completions", BODY)
    assert refused.status_code == 503
    assert "the server is starting" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(("problem", "status"), [("", 200), ("the server is being stopped", 503)])
async def test_health(starting: HttpDeployment, problem: str, status: int) -> None:
    starting.http._not_ready = lambda: problem
    async with starting.raw() as client:
        response = await client.get("/health")
    assert response.status_code == status
    assert problem in response.text


async def test_two_servers_on_one_port(deployment: HttpDeployment) -> None:
    port = deployment.http.port
    second = HttpServer(deployment.service, "127.0.0.1", port, authenticator=Authenticator())
    with pytest.raises(InvalidArgument, match=r"http_port: got .* a port that is free"):
        await second.start()


async def test_a_slow_reader_does_not_keep_the_engine_busy(deployment: HttpDeployment) -> None:
    async with (
        deployment.raw() as client,
        client.stream(
            "POST", "/v1/completions", json={**BODY, "max_tokens": 4000, "stream": True}
        ) as response,
    ):
        await deployment.engine.until_running(0)
        text = "".join([part async for part in response.aiter_text()])
    assert text.endswith("data: [DONE]\n\n")
    assert isinstance(response, httpx.Response)
