"""Spans of requests over HTTP, as an OTLP collector gets them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.telemetry.tracing import open_tracing
from tests.server.openai.conftest import http_deployment
from tests.server.telemetry.collector import collecting, plain

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_that_goes_on_a_trace(
    vllm_config: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with collecting() as collector:
        tracing = open_tracing(collector.endpoint, "1.2.3")
        assert tracing is not None
        observers = [tracing.observer(lambda: "toy")]
        async with http_deployment(vllm_config, observers=observers) as deployment:
            await deployment.open()
            body = {"prompt": "Once", "max_tokens": 3, "stream": stream, "ignore_eos": True}
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
            await deployment.post("/v1/completions", body, headers=headers)
            (span,) = await asyncio.to_thread(collector.wait_for, 1)
        await asyncio.to_thread(tracing.close)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    attributes = plain(span.attributes)
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.stream": stream,
        "gen_ai.usage.output_tokens": 3,
        "fathom.decode_layers": 8,
    }
    assert {name: attributes.get(name) for name in expected} == expected
    assert "rpc.method" not in attributes
