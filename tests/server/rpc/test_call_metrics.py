"""What a scrape over HTTP shows after real calls."""

from __future__ import annotations

import pytest

from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2
from tests.server.rpc.conftest import Deployment, collect, failure

GENERATE = "fathom.v1.Inference/Generate"


def request(**depth: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="Once",
        depth=common_pb2.Depth(**depth),  # type: ignore[arg-type]
        stop=inference_pb2.StopConditions(max_tokens=6, ignore_eos=True),
    )


async def test_tokens_and_latencies_by_depth(deployment: Deployment) -> None:
    inference = deployment.client.inference
    for layers in (4, 4, 8):
        await inference.Generate(request(layers=layers))
    await collect(inference.GenerateStream(request(level="generative")))
    samples = await deployment.scrape()

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert value("fathom_requests_total", method=GENERATE, depth="4", code="OK") == 2
    assert value("fathom_requests_total", method=GENERATE, depth="8", code="OK") == 1
    assert value("fathom_requests_total", method=GENERATE + "Stream", depth="8", code="OK") == 1
    num_prompt_tokens = len("Once") + 1
    for depth in ("4", "8"):
        assert value("fathom_prompt_tokens_total", depth=depth) == 2 * num_prompt_tokens
        assert value("fathom_generation_tokens_total", depth=depth) == 2 * 6
        assert value("fathom_tokens_per_second", depth=depth) == 2 * 6 / 10
        assert value("fathom_time_to_first_token_seconds_count", depth=depth) == 2
        assert value("fathom_inter_token_latency_seconds_count", depth=depth) == 2 * 5
        assert value("fathom_request_duration_seconds_count", depth=depth) == 2
        assert value("fathom_request_queue_seconds_count", depth=depth) == 2
        assert value("fathom_request_queue_seconds_sum", depth=depth) >= 2 * 0.25
    assert value("fathom_requests_running") == 0
    assert value("fathom_requests_waiting") == 0
    assert value("fathom_engine_up") == 1
    assert value("fathom_engine_restarts_total") == 0


@pytest.mark.parametrize(
    ("asked", "depth", "code"),
    [
        (request(layers=9), "", "INVALID_ARGUMENT"),
        (request(level="warp"), "", "NOT_FOUND"),
        (request(auto=common_pb2.Auto(max_quality_loss=1)), "", "FAILED_PRECONDITION"),
    ],
)
async def test_refused_calls_are_counted_by_code(
    deployment: Deployment, asked: inference_pb2.GenerateRequest, depth: str, code: str
) -> None:
    await failure(deployment.client.inference.Generate(asked))
    labels = {"method": GENERATE, "depth": depth, "code": code}
    assert await deployment.metric("fathom_requests_total", **labels) == 1
    assert await deployment.metric("fathom_generation_tokens_total", depth="8") is None
