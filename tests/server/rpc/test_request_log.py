"""The line of each call: what it tells, and that it never tells a client's text."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from server.rpc.access import AccessFiles
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from server.telemetry.log_format import FIELDS, JsonLines, TextLines
from server.telemetry.request_log import log_request
from tests.server.rpc.conftest import collect, failure
from tests.server.rpc.secured import Secured, secured

SECRET = "the-secret-of-a-client"


@pytest.fixture
async def server(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Secured]:
    caplog.set_level(logging.DEBUG)
    async with secured(AccessFiles(), observers=(log_request,)) as server:
        yield server


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [getattr(r, FIELDS) for r in caplog.records if r.name == "server.requests"]


def request(**changes: Any) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        request_id="mine",
        prompt=SECRET,
        stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True),
    )
    request.MergeFrom(inference_pb2.GenerateRequest(**changes))
    return request


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_request_that_is_answered(
    server: Secured, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    asked = request()
    asked.depth.level = "generative"
    call = getattr(server.client.inference, method)(asked)
    await (collect(call) if method == "GenerateStream" else call)
    (line,) = lines(caplog)
    times = line.pop("queue"), line.pop("time_to_first_token"), line.pop("total")
    assert times[0] >= 0.25  # as the toy says
    assert 0 < times[1] <= times[2]
    assert line.pop("peer").startswith("127.0.0.1:")
    assert line == {
        "request_id": "mine",
        "client": "127.0.0.1",
        "method": f"fathom.v1.Inference/{method}",
        "code": "OK",
        "prefill_layers": 4,
        "decode_layers": 8,
        "served": "requested",
        "finish_reason": "length",
        "prompt_tokens": len(SECRET) + 1,
        "generated_tokens": 3,
        "cached_tokens": 1,
    }


async def test_a_request_that_is_cancelled(
    server: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request()
    asked.stop.max_tokens = 4000
    stream = server.client.inference.GenerateStream(asked)
    await stream.read()
    await stream.read()
    server.engine.gate.clear()
    stream.cancel()
    await server.engine.until_freed()
    while not lines(caplog):
        await asyncio.sleep(0.01)
    (line,) = lines(caplog)
    assert line["code"] == "CANCELLED"
    assert line["generated_tokens"] >= 1
    assert line["time_to_first_token"] > 0
    assert "finish_reason" not in line


async def test_requests_that_are_refused(server: Secured, caplog: pytest.LogCaptureFixture) -> None:
    inference = server.client.inference
    refused = request()
    refused.stop.max_tokens = 0
    await failure(inference.Generate(refused))
    await failure(inference.Generate(request(request_id="x" * 1000)))
    await server.client.control.Drain(control_pb2.DrainRequest())
    await failure(inference.Generate(request()))
    found = [
        (line.get("request_id"), line["code"], line.get("refused_field")) for line in lines(caplog)
    ]
    assert found == [
        (None, "INVALID_ARGUMENT", "stop.max_tokens"),
        ("x" * 128, "INVALID_ARGUMENT", "request_id"),
        (None, "OK", None),
        ("mine", "UNAVAILABLE", None),
    ]
    assert all("decode_layers" not in line for line in lines(caplog))


async def test_no_text_of_a_client_is_logged(
    server: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happens to a request; not even in the lines of a log for debugging."""
    inference, control = server.client.inference, server.client.control
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=SECRET, content=SECRET)])
    stop = inference_pb2.StopConditions(stop=[SECRET] * 2, max_tokens=2)
    long_stop = inference_pb2.StopConditions(stop=[SECRET * 100])
    calls: list[Callable[[], Any]] = [
        lambda: inference.Generate(request()),
        lambda: inference.Generate(request(stop=stop)),
        lambda: inference.Generate(request(stop=long_stop)),
        lambda: inference.Generate(request(chat=chat)),
        lambda: inference.Generate(request(prompt=SECRET * 1000)),
        lambda: inference.Generate(request(output=inference_pb2.OutputOptions(echo=True))),
        lambda: inference.Score(inference_pb2.ScoreRequest(text=SECRET)),
        lambda: inference.Score(inference_pb2.ScoreRequest(context_text=SECRET, text="")),
        lambda: inference.Tokenize(inference_pb2.TokenizeRequest(text=SECRET)),
        lambda: control.Calibrate(control_pb2.CalibrateRequest(texts=[SECRET])).read(),
    ]
    codes = set()
    for call in calls:
        try:
            await call()
            codes.add(grpc.StatusCode.OK)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
    server.engine.die()
    codes.add((await failure(inference.Generate(request()))).code())
    assert codes == {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAVAILABLE,
    }
    assert len(lines(caplog)) >= len(calls)
    for record in caplog.records:
        for formatter in (JsonLines(), TextLines("%(message)s")):
            assert SECRET not in formatter.format(record)
