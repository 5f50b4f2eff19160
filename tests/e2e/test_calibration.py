"""A new plan while requests run: they keep the layers they began with."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from server.model.source import DEMO_MODEL
from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from tests.e2e.calls import LONG, Streamed, greedy_request
from tests.e2e.running_server import RunningServer
from tests.server.engine.elastic import reference

# Nothing like documentation, so that the layers rank in another order.
OTHER_TEXTS = [" ".join(str(n * n % 9973) for n in range(start, start + 900)) for start in (1, 7)]


def calibrate(
    client: Client, request: control_pb2.CalibrateRequest, at_quality: Callable[[], None]
) -> tuple[list[str], common_pb2.Plan]:
    """Return the phases of which progress was reported, and the plan.

    ``at_quality`` is called when the last thing before the plan is installed has begun.
    """
    phases: list[str] = []
    for message in client.calibrate(request):
        if message.WhichOneof("event") == "plan":
            return phases, message.plan
        if message.progress.phase not in phases:
            phases.append(message.progress.phase)
            if message.progress.phase == "quality":
                at_quality()
    raise AssertionError("the stream ended without a plan")


def skips(plan: common_pb2.Plan, depth: int) -> list[int]:
    return sorted(plan.removal_order[: len(plan.removal_order) - depth])


def test_running_requests_keep_their_layers_and_new_ones_get_the_new_plan(
    demo_server: RunningServer, demo_client: Client
) -> None:
    before = demo_client.get_plan().plan
    depths = range(6, 15)
    streams: dict[int, list[inference_pb2.GenerateStreamResponse]] = {}

    def stream(depth: int) -> None:
        request = greedy_request("Return the", LONG, depth=depth)
        streams[depth] = list(demo_client.generate_stream(request))

    threads = [threading.Thread(target=stream, args=[depth]) for depth in depths]

    def begin() -> None:
        for thread in threads:
            thread.start()

    request = control_pb2.CalibrateRequest(texts=OTHER_TEXTS, max_tokens=2048)
    phases, plan = calibrate(demo_client, request, begin)

    assert phases == ["importance", "quality", "probes"]
    assert demo_client.get_plan().plan == plan
    assert plan.text_fingerprint != before.text_fingerprint
    changed = [depth for depth in depths if skips(plan, depth) != skips(before, depth)]
    assert changed, "the other text was meant to rank the layers in another order"
    influence = demo_server.scrape().by_label("fathom_layer_block_influence", "layer")
    assert influence == {str(layer.layer): pytest.approx(layer.score) for layer in plan.layers}

    for thread in threads:
        thread.join()
    depth = changed[0]
    text = inference_pb2.TokenizeRequest(text="Return the")
    prompt_ids = list(demo_client.tokenize(text).ids)
    deltas = Streamed.of(streams[depth]).deltas
    old = [token_id for delta in deltas for token_id in delta.token_ids]
    new = demo_client.generate(greedy_request("Return the", LONG, depth=depth)).token_ids
    for used, tokens in ((before, old), (plan, list(new))):
        cut = reference.cut(DEMO_MODEL, skips(used, depth))
        assert tokens == reference.generate(cut, prompt_ids, LONG)

    _, restored = calibrate(demo_client, control_pb2.CalibrateRequest(), lambda: None)
    assert restored.text_fingerprint == before.text_fingerprint
    assert list(restored.removal_order) == list(before.removal_order)
