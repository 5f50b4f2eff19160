"""Spans as an OTLP collector gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from server.errors import InvalidArgument
from server.rpc.access import AccessFiles
from server.rpc.generated.fathom.v1 import inference_pb2
from server.telemetry.tracing import Tracing, open_tracing
from tests.server.rpc.conftest import collect, failure
from tests.server.rpc.secured import Secured, secured
from tests.server.telemetry.collector import Collector, collecting, plain

SECRET = "the-secret-of-a-client"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER, ERROR = 2, 2


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def tracing(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Tracing:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    tracing = open_tracing(collector.endpoint, "1.2.3")
    assert tracing is not None
    return tracing


@pytest.fixture
async def server(tracing: Tracing) -> AsyncIterator[Secured]:
    async with secured(AccessFiles(), observers=(tracing.observer(lambda: "toy"),)) as server:
        yield server
    await asyncio.to_thread(tracing.close)


def request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id="mine",
        prompt=SECRET,
        sampling=inference_pb2.SamplingParams(temperature=0.5, seed=7),
        stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True, stop=[SECRET]),
    )


async def test_a_span_that_goes_on_a_trace(server: Secured, collector: Collector) -> None:
    traceparent = f"00-{TRACE_ID}-{PARENT_ID}-01"
    stream = server.client.inference.GenerateStream(
        request(), metadata=[("traceparent", traceparent), ("tracestate", "vendor=value")]
    )
    await collect(stream)
    (span,) = await asyncio.to_thread(collector.wait_for, 1)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert span.trace_state == "vendor=value"
    assert (span.name, span.kind) == ("text_completion toy", SERVER)
    assert span.start_time_unix_nano < span.end_time_unix_nano
    attributes = plain(span.attributes)
    assert attributes.pop("client.port") > 0
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "fathom.v1.Inference/GenerateStream",
        "rpc.response.status_code": "OK",
        "client.address": "127.0.0.1",
        "enduser.id": "127.0.0.1",
        "fathom.prefill_layers": 8,
        "fathom.decode_layers": 8,
        "fathom.served": "default",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "fathom",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "toy",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "mine",
        "gen_ai.response.model": "toy",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(SECRET) + 1,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
    }
    assert collector.resources[0]["service.name"] == "fathom"
    assert collector.resources[0]["service.version"] == "1.2.3"
    assert SECRET.encode() not in collector.raw


@pytest.mark.parametrize("header", ["junk", f"00-{'0' * 32}-{PARENT_ID}-01", "x" * 5000])
async def test_a_context_that_is_none_begins_a_trace(
    server: Secured, collector: Collector, header: str
) -> None:
    await server.client.inference.Generate(request(), metadata=[("traceparent", header)])
    (span,) = await asyncio.to_thread(collector.wait_for, 1)
    assert span.parent_span_id == b""


async def test_a_trace_that_is_not_sampled_is_not_sent(
    server: Secured, collector: Collector
) -> None:
    inference = server.client.inference
    unsampled = f"00-{TRACE_ID}-{PARENT_ID}-00"
    await inference.Generate(request(), metadata=[("traceparent", unsampled)])
    await inference.Generate(request())
    (span,) = await asyncio.to_thread(collector.wait_for, 1)
    assert span.trace_id.hex() != TRACE_ID


async def test_errors(server: Secured, collector: Collector) -> None:
    inference = server.client.inference
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=SECRET)])
    await inference.Generate(inference_pb2.GenerateRequest(chat=chat))
    refused = request()
    refused.depth.level = SECRET
    await failure(inference.Generate(refused))
    server.engine.die()
    await failure(inference.Generate(request()))
    await failure(inference.Score(inference_pb2.ScoreRequest()))
    spans = await asyncio.to_thread(collector.wait_for, 4)
    found = [
        (span.name, plain(span.attributes).get("error.type"), span.status.code) for span in spans
    ]
    assert found == [
        ("chat toy", None, 0),
        ("text_completion toy", "NOT_FOUND", 0),
        ("text_completion toy", "UNAVAILABLE", ERROR),
        ("fathom.v1.Inference/Score", "INVALID_ARGUMENT", 0),
    ]
    assert SECRET.encode() not in collector.raw


def test_a_collector_that_is_away_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracing = open_tracing("http://127.0.0.1:1", "1")
    assert tracing is not None
    tracing.close()


def test_off_by_default_and_by_the_standard_variables() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert open_tracing(None, "1", {}) is None
    assert open_tracing(None, "1", {**endpoint, "OTEL_SDK_DISABLED": "true"}) is None
    assert open_tracing(None, "1", {**endpoint, "OTEL_TRACES_EXPORTER": "none"}) is None
    tracing = open_tracing(None, "1", endpoint)
    assert tracing is not None
    tracing.close()


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"otlp_endpoint: got 'http://x', .*extra otel"):
        open_tracing("http://x", "1", {})
    assert open_tracing(None, "1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None
    assert "without the extra otel" in caplog.text


def test_it_costs_no_import_while_it_is_off() -> None:
    script = """
import sys
from server.telemetry.tracing import open_tracing
assert open_tracing(None, "1", {}) is None
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
