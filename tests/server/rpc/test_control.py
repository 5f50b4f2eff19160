"""What operators do over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

import grpc
import pytest

from pruning.quality import Quality
from server.depth.levels import DepthPair, Level
from server.engine.base import LayerSelection, ProgressCallback
from server.rpc.generated.fathom.v1 import (
    common_pb2,
    control_pb2,
    inference_pb2,
    inference_pb2_grpc,
)
from tests.server.rpc.conftest import REMOVAL_ORDER, Deployment, failure, message_of
from tests.server.rpc.toy_engine import expected_tokens


def generate_request(**depth: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="Once",
        depth=common_pb2.Depth(**depth),  # type: ignore[arg-type]
        stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True),
    )


async def test_get_plan(deployment: Deployment) -> None:
    plan = (await deployment.client.control.GetPlan(control_pb2.GetPlanRequest())).plan
    assert list(plan.removal_order) == list(REMOVAL_ORDER)
    assert [layer.layer for layer in plan.layers] == list(range(8))
    assert [layer.score for layer in plan.layers] == [0.9, 0.6, 0.5, 0.3, 0.2, 0.1, 0.4, 0.8]
    assert (plan.metric, plan.num_tokens, plan.created_at) == ("block_influence", 1000, 1.7e9)
    assert (plan.model_fingerprint, plan.text_fingerprint) == ("sha256:model", "sha256:text")
    assert dict(plan.versions) == {"toy": "1"}


async def test_calibrate_installs_plan_and_measurements(deployment: Deployment) -> None:
    request = control_pb2.CalibrateRequest(texts=["some other text " * 9], max_tokens=100)
    *events, last = [event async for event in deployment.client.control.Calibrate(request)]
    assert {event.WhichOneof("event") for event in events} == {"progress"}
    by_phase: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        progress = event.progress
        by_phase.setdefault(progress.phase, []).append((progress.done, progress.total))
    assert list(by_phase) == ["importance", "quality", "speed"]
    for steps in by_phase.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    plan = last.plan
    assert list(plan.removal_order) != list(REMOVAL_ORDER)
    # The token that begins a text is measured, too.
    assert plan.num_tokens == 101
    scores = {layer.layer: layer.score for layer in plan.layers}
    assert list(plan.removal_order) == sorted(scores, key=lambda layer: scores[layer])
    answer = await deployment.client.control.GetPlan(control_pb2.GetPlanRequest())
    assert answer.plan == plan

    response = await deployment.client.inference.GetModel(inference_pb2.GetModelRequest())
    dense, fast, generative = response.model.levels
    assert dense.quality.perplexity == 10
    assert dense.speed.speedup == 1
    for level in (dense, fast, generative):
        assert level.quality.num_tokens > 0
        assert level.speed.tokens_per_second > 0
        assert level.speed.num_streams == 8
    uniform = [
        d.decode_layers for d in response.model.depths if d.prefill_layers == d.decode_layers
    ]
    assert uniform == [8, 7, 6, 5, 4, 3, 2, 1]
    assert [policy.plan.text_fingerprint for policy in deployment.saved] == [plan.text_fingerprint]

    fast = control_pb2.Policy(level="fast")
    await deployment.client.control.SetPolicy(control_pb2.SetPolicyRequest(policy=fast))
    auto = generate_request(auto=common_pb2.Auto(max_quality_loss=0.25))
    answered = await deployment.client.inference.Generate(auto)
    # exp(0.1 * 2) - 1 is 0.22, exp(0.1 * 3) - 1 is 0.35.
    assert answered.served == common_pb2.Served(
        prefill_layers=6, decode_layers=6, reason=common_pb2.Served.REASON_AUTO
    )
    samples = await deployment.scrape()
    assert samples["fathom_depth_perplexity", frozenset({("depth", "8")})] == 10
    assert (
        samples["fathom_layer_block_influence", frozenset({("layer", "3")})] == plan.layers[3].score
    )


async def test_running_requests_keep_their_layers(
    deployment: Deployment, narrow_stub: inference_pb2_grpc.InferenceStub
) -> None:
    asked = generate_request(layers=4)
    asked.stop.max_tokens = 1000
    asked.output.token_ids = True
    # Large messages: the server cannot send them all before they are read.
    asked.output.logprobs = 20
    stream = narrow_stub.GenerateStream(asked)
    assert (await stream.read()).HasField("prompt_info")
    await deployment.engine.until_running(1)
    running = deployment.engine.requests[-1]
    async for _ in deployment.client.control.Calibrate(control_pb2.CalibrateRequest()):
        pass
    assert deployment.engine.load().num_running == 1
    token_ids: list[int] = []
    while not (message := await stream.read()).HasField("finish_info"):
        token_ids.extend(message.delta.token_ids)
    assert token_ids == expected_tokens(running.prompt_ids, running.layers, 1000)
    await deployment.client.inference.Generate(generate_request(layers=4))
    assert deployment.engine.requests[-1].layers != running.layers


async def test_levels_are_probed(starting: Deployment) -> None:
    """Enough held-out text for probes, no two passages of which are alike."""
    starting.held_out = "".join(f"{i * i} is the square of {i}. " for i in range(99))
    starting.max_held_out_tokens = 1000
    await starting.open()
    client = starting.client
    calls = client.control.Calibrate(control_pb2.CalibrateRequest())
    *events, _ = [event async for event in calls]
    steps = [
        (event.progress.done, event.progress.total)
        for event in events
        if event.progress.phase == "probes"
    ]
    assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    phases = dict.fromkeys(event.progress.phase for event in events)
    assert list(phases) == ["importance", "quality", "speed", "probes"]

    model = (await client.inference.GetModel(inference_pb2.GetModelRequest())).model
    policy = starting.service.policy
    assert starting.saved[-1].probes == policy.probes
    by_depth = {(each.prefill_layers, each.decode_layers): each for each in model.depths}
    for level in model.levels:
        probes = policy.probes[policy.level(level.name).depths]
        for name, found, shown in (
            ("writing", probes.writing, level.writing),
            ("choosing", probes.choosing, level.choosing),
        ):
            assert level.HasField(name)
            assert found is not None
            for field in dataclasses.fields(found):
                assert getattr(shown, field.name) == getattr(found, field.name)
        depths = by_depth[level.prefill_layers, level.decode_layers]
        assert (depths.writing, depths.choosing) == (level.writing, level.choosing)
    assert not by_depth[7, 7].HasField("writing"), "only levels are probed"

    request = control_pb2.SetLevelsRequest()
    request.levels.add(name="dense").depth.layers = 8
    request.levels.add(name="thin").depth.layers = 2
    num_requests = len(starting.engine.requests)
    _, thin = (await client.control.SetLevels(request)).levels
    assert thin.HasField("writing")
    assert thin.HasField("choosing")
    probed = {
        each.layers
        for each in starting.engine.requests[num_requests:]
        if each.request_id.startswith("probe-")
    }
    assert probed == {policy.selection(DepthPair(2, 2))}, "the others have been probed"


async def test_calibrate_by_another_metric(deployment: Deployment) -> None:
    request = control_pb2.CalibrateRequest(metric="single_removal_kl")
    *events, last = [event async for event in deployment.client.control.Calibrate(request)]
    phases = dict.fromkeys(event.progress.phase for event in events)
    assert list(phases) == ["importance", "search", "quality", "speed"]
    plan = last.plan
    assert plan.metric == "single_removal_kl"
    # To the toy all layers are alike, and of equal ones the deeper goes first.
    assert list(plan.other_scores["single_removal_kl"].scores) == [0.01] * 8
    assert list(plan.removal_order) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert len({layer.score for layer in plan.layers}) == 8, "Block Influence is measured as well"
    answer = await deployment.client.control.GetPlan(control_pb2.GetPlanRequest())
    assert answer.plan == plan
    assert deployment.saved[-1].plan.metric == "single_removal_kl"

    calls = deployment.client.control
    *_, last = [event async for event in calls.Calibrate(control_pb2.CalibrateRequest())]
    assert last.plan.metric == "block_influence"
    assert last.plan.other_scores.keys() == {"relative_magnitude", "norm", "angular_distance"}


@pytest.mark.parametrize("metric", ["", "greedy", "Norm"])
async def test_calibrate_by_a_metric_that_no_server_has(
    deployment: Deployment, metric: str
) -> None:
    call = deployment.client.control.Calibrate(control_pb2.CalibrateRequest(metric=metric))
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message_of(error).startswith(
        f"metric: got '{metric}', allowed: block_influence, relative_magnitude, norm, "
        "angular_distance, reverse_order, sequential, single_removal_kl, greedy_kl"
    )
    assert deployment.service.policy.plan.removal_order == REMOVAL_ORDER


async def test_a_cancelled_calibration_changes_nothing(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.control.Calibrate(control_pb2.CalibrateRequest())
    while not deployment.service.is_measuring:
        await asyncio.sleep(0.01)
    other = deployment.client.control.Calibrate(control_pb2.CalibrateRequest())
    error = await failure(other.read())
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message_of(error) == "another Calibrate or SetLevels is running"
    call.cancel()
    while deployment.service.is_measuring:
        await asyncio.sleep(0.01)
    assert deployment.service.policy.plan.removal_order == REMOVAL_ORDER
    deployment.engine.gate.set()
    events = [
        event async for event in deployment.client.control.Calibrate(control_pb2.CalibrateRequest())
    ]
    assert events[-1].HasField("plan")


async def test_set_levels(deployment: Deployment) -> None:
    request = control_pb2.SetLevelsRequest(default_level="thin")
    thin = request.levels.add(name="thin")
    thin.depth.prune_ratio = 0.75
    wide = request.levels.add(name="wide")
    wide.depth.layers = 7
    wide.prefill_depth.layers = 5
    response = await deployment.client.control.SetLevels(request)
    levels = [
        (lv.name, lv.prefill_layers, lv.decode_layers, lv.is_default) for lv in response.levels
    ]
    assert levels == [("thin", 2, 2, True), ("wide", 5, 7, False)]
    assert all(level.HasField("quality") and level.HasField("speed") for level in response.levels)
    answered = await deployment.client.inference.Generate(generate_request())
    assert answered.served == common_pb2.Served(
        prefill_layers=2, decode_layers=2, reason=common_pb2.Served.REASON_DEFAULT
    )
    error = await failure(deployment.client.inference.Generate(generate_request(level="fast")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert message_of(error) == "no level 'fast'; the levels are thin, wide"


async def test_levels_by_quality(deployment: Deployment) -> None:
    """The toy's perplexity grows by 10 % with each layer that is left out."""
    control = deployment.client.control
    specs = [
        control_pb2.LevelSpec(name="full", depth=common_pb2.Depth(layers=8)),
        control_pb2.LevelSpec(name="fast", max_quality_loss=0.25),
        control_pb2.LevelSpec(name="prompt", max_quality_loss=0.25, prompt_only=True),
        control_pb2.LevelSpec(name="perfect", max_quality_loss=0.001),
    ]
    response = await control.SetLevels(control_pb2.SetLevelsRequest(levels=specs))
    assert [(x.name, x.prefill_layers, x.decode_layers) for x in response.levels] == [
        ("full", 8, 8),
        ("fast", 6, 6),
        ("prompt", 4, 8),
        ("perfect", 8, 8),
    ]
    assert not response.levels[0].HasField("max_quality_loss")
    assert [x.max_quality_loss for x in response.levels[1:]] == [0.25, 0.25, 0.001]
    assert all(level.HasField("quality") and level.HasField("speed") for level in response.levels)
    status = await control.GetStatus(control_pb2.GetStatusRequest())
    assert status.level_problems == [
        "level perfect: no depth was found that loses at most 0.001 in perplexity, so it runs all "
        "8 layers"
    ]
    assert not status.unmeasured
    model = (await deployment.client.inference.GetModel(inference_pb2.GetModelRequest())).model
    assert list(model.levels) == list(response.levels)
    assert {(x.prefill_layers, x.decode_layers) for x in model.depths} == {
        *((depth, depth) for depth in range(1, 9)),
        (4, 8),
    }, "of the prompt, only what a level has"
    for level, loss in (("fast", 0.25), ("perfect", 0.001)):
        assert await deployment.metric("fathom_level_max_quality_loss", level=level) == loss
    assert await deployment.metric("fathom_level_max_quality_loss", level="full") is None

    # Other levels, other problems.
    request = control_pb2.SetLevelsRequest(levels=specs[:1])
    await control.SetLevels(request)
    assert not (await control.GetStatus(control_pb2.GetStatusRequest())).level_problems


async def test_a_new_plan_gives_levels_by_quality_other_depths(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = deployment.client.control
    spec = control_pb2.LevelSpec(name="fast", max_quality_loss=0.25)
    await control.SetLevels(control_pb2.SetLevelsRequest(levels=[spec]))
    assert deployment.service.policy.level("fast").depths == DepthPair(6, 6)
    measure = deployment.engine.measure_quality

    async def twice_as_bad(
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        qualities = await measure(windows, selections, progress)
        return [replace(q, perplexity=10 * (q.perplexity / 10) ** 2) for q in qualities]

    monkeypatch.setattr(deployment.engine, "measure_quality", twice_as_bad)
    request = control_pb2.CalibrateRequest(texts=["some other text " * 9])
    *_, last = [event async for event in control.Calibrate(request)]
    assert last.HasField("plan")
    policy = deployment.service.policy
    assert policy.level("fast") == Level("fast", 7, 7, 0.25)
    assert DepthPair(7, 7) in policy.speeds


async def test_engines_are_prepared_before_and_released_after(deployment: Deployment) -> None:
    engine, service = deployment.engine, deployment.service
    request = control_pb2.SetLevelsRequest()
    request.levels.add(name="thin").depth.layers = 2
    await deployment.client.control.SetLevels(request)
    assert engine.prepared == set(service.policy.level_selections().values())
    [event async for event in deployment.client.control.Calibrate(control_pb2.CalibrateRequest())]
    assert engine.prepared == set(service.policy.level_selections().values())


async def test_levels_that_cannot_be_prepared_change_nothing(deployment: Deployment) -> None:
    before = deployment.service.policy
    deployment.engine.num_failing_preparations = 2
    request = control_pb2.SetLevelsRequest()
    request.levels.add(name="thin").depth.layers = 2
    error = await failure(deployment.client.control.SetLevels(request))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message_of(error) == "depth 5: no memory for it"
    calibration = deployment.client.control.Calibrate(control_pb2.CalibrateRequest())

    async def drained() -> None:
        async for _ in calibration:
            pass

    error = await failure(drained())
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert deployment.service.policy is before


async def test_set_policy(deployment: Deployment) -> None:
    set_policy = deployment.client.control.SetPolicy
    request = control_pb2.SetPolicyRequest(policy=control_pb2.Policy(level="fast"))
    in_force = (await set_policy(request)).policy
    assert in_force == control_pb2.Policy(
        level="fast",
        ladder=["fast"],
        time_to_first_token_seconds=1.0,
        inter_token_latency_seconds=0.1,
        hold_seconds=30.0,
        max_quality_loss=0.25,
        min_agreement=0.0,
        by_default=False,
        score_ladder=["fast"],
        max_writing_loss=math.inf,
        max_repetition=1.0,
        max_choosing_loss=1.0,
    )
    answered = await deployment.client.inference.Generate(generate_request(auto=common_pb2.Auto()))
    assert answered.served == common_pb2.Served(
        prefill_layers=4, decode_layers=4, reason=common_pb2.Served.REASON_AUTO
    )
    assert await deployment.metric("fathom_policy_level", level="fast") == 1
    assert await deployment.metric("fathom_policy_degraded") == 0
    answered = await deployment.client.inference.Generate(generate_request())
    assert answered.served.reason == common_pb2.Served.REASON_DEFAULT
    # What is absent stays.
    changed = control_pb2.Policy(by_default=True, hold_seconds=7)
    response = await set_policy(control_pb2.SetPolicyRequest(policy=changed))
    in_force.MergeFrom(changed)
    assert response.policy == in_force
    answered = await deployment.client.inference.Generate(generate_request())
    assert answered.served.reason == common_pb2.Served.REASON_AUTO
    status = await deployment.client.control.GetStatus(control_pb2.GetStatusRequest())
    assert (status.auto_level, status.auto_score_level) == ("fast", "fast")
    assert status.policy == in_force


@pytest.mark.parametrize(
    ("policy", "code", "message"),
    [
        (
            control_pb2.Policy(level="warp"),
            grpc.StatusCode.NOT_FOUND,
            "no level 'warp'; the levels are dense, fast, generative",
        ),
        (
            control_pb2.Policy(ladder=["dense", "warp"]),
            grpc.StatusCode.NOT_FOUND,
            "no level 'warp'; the levels are dense, fast, generative",
        ),
        (
            control_pb2.Policy(ladder=["dense", "fast", "dense"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.ladder: got ['dense', 'fast', 'dense'], allowed: each level once",
        ),
        (
            control_pb2.Policy(level="fast", ladder=["dense", "fast"]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.level: got 'fast', allowed: dense, the first of policy.ladder",
        ),
        (
            control_pb2.Policy(time_to_first_token_seconds=0),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.time_to_first_token_seconds: got 0.0, allowed: more than 0",
        ),
        (
            control_pb2.Policy(max_quality_loss=-1),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.max_quality_loss: got -1.0, allowed: 0 or more",
        ),
        (
            control_pb2.Policy(max_writing_loss=math.nan),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.max_writing_loss: got nan, allowed: 0 or more",
        ),
        (
            control_pb2.Policy(max_repetition=-0.1),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.max_repetition: got -0.1, allowed: 0 to 1",
        ),
        (
            control_pb2.Policy(max_choosing_loss=math.inf),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.max_choosing_loss: got inf, allowed: 0 to 1",
        ),
        (
            control_pb2.Policy(min_agreement=1.5),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.min_agreement: got 1.5, allowed: 0 to 1",
        ),
    ],
)
async def test_policies_that_cannot_be(
    deployment: Deployment, policy: control_pb2.Policy, code: grpc.StatusCode, message: str
) -> None:
    before = await deployment.client.control.SetPolicy(control_pb2.SetPolicyRequest())
    request = control_pb2.SetPolicyRequest(policy=policy)
    error = await failure(deployment.client.control.SetPolicy(request))
    assert (error.code(), message_of(error)) == (code, message)
    assert await deployment.client.control.SetPolicy(control_pb2.SetPolicyRequest()) == before


async def test_status_while_starting_and_serving(starting: Deployment) -> None:
    get_status = starting.client.control.GetStatus
    with starting.service.phase("reading text"):
        status = await get_status(control_pb2.GetStatusRequest())
    assert status.state == control_pb2.GetStatusResponse.STATE_STARTING
    assert status.startup_phase == "reading text"
    await starting.open()
    starting.engine.gate.clear()
    call = starting.client.inference.Generate(generate_request())
    await starting.engine.until_running(1)
    status = await get_status(control_pb2.GetStatusRequest())
    assert status.state == control_pb2.GetStatusResponse.STATE_SERVING
    assert (status.num_running, status.num_waiting, status.num_engine_restarts) == (1, 0, 0)
    assert set(status.startup_seconds) == {"reading text", "engine"}
    assert (status.startup_phase, status.version) == ("", "1.2.3")
    assert status.uptime_seconds > 0
    starting.engine.gate.set()
    await call


@pytest.mark.parametrize("waits", [True, False])
async def test_drain(deployment: Deployment, waits: bool) -> None:
    deployment.engine.gate.clear()
    running = deployment.client.inference.Generate(generate_request())
    await deployment.engine.until_running(1)
    request = control_pb2.DrainRequest() if waits else control_pb2.DrainRequest(grace_seconds=0.1)
    drain = deployment.client.control.Drain(request)
    status = control_pb2.GetStatusResponse()
    while status.state != control_pb2.GetStatusResponse.STATE_DRAINING:
        status = await deployment.client.control.GetStatus(control_pb2.GetStatusRequest())
    error = await failure(deployment.client.inference.Generate(generate_request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert message_of(error) == "the server is draining and takes no more requests"
    if waits:
        deployment.engine.gate.set()
        assert (await running).finish_info.usage.num_generated_tokens == 3
        assert (await drain).num_unfinished == 0
    else:
        assert (await drain).num_unfinished == 1
        await deployment.rpc.stop()
        await failure(running)
        await deployment.engine.until_freed(deployment.engine.requests[0].request_id)
