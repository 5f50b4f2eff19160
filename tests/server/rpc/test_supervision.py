"""A server that is not ready, is full, or whose engine dies."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest

from server.depth.autodepth import AutoDepth, PresentLevels
from server.rpc.client import retry_delay
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from server.serving.service_state import State
from tests.server.rpc.conftest import Deployment, collect, failure, message_of


def request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="Once", stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True)
    )


async def test_a_starting_server_says_what_it_is_doing(starting: Deployment) -> None:
    inference, control = starting.client.inference, starting.client.control
    with starting.service.phase("loading the model"):
        for call in (
            inference.Generate(request()),
            inference.GenerateStream(request()).read(),
            inference.Score(inference_pb2.ScoreRequest(text="abc")),
            inference.Tokenize(inference_pb2.TokenizeRequest(text="abc")),
            inference.GetModel(inference_pb2.GetModelRequest()),
            control.GetPlan(control_pb2.GetPlanRequest()),
            control.Calibrate(control_pb2.CalibrateRequest()).read(),
            control.SetLevels(control_pb2.SetLevelsRequest()),
            control.SetPolicy(control_pb2.SetPolicyRequest()),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert message_of(error) == "the server is starting: loading the model"
            assert retry_delay(error) == 1.0
    await starting.open()
    assert (await inference.Generate(request())).HasField("finish_info")
    assert "loading the model" in starting.service.status().startup_seconds
    assert await starting.metric("fathom_startup_seconds", phase="engine") is not None


@pytest.mark.parametrize("starting", [{"max_waiting": 2}], indirect=True)
async def test_a_full_queue(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    waiting = [
        asyncio.ensure_future(collect(deployment.client.inference.GenerateStream(request())))
    ]
    waiting += [
        asyncio.ensure_future(collect(deployment.client.inference.GenerateStream(request())))
    ]
    await deployment.engine.until_running(2)
    for call in (
        deployment.client.inference.Generate(request()),
        deployment.client.inference.Score(inference_pb2.ScoreRequest(text="abc")),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert message_of(error) == ("2 requests wait, as many as max_waiting allows; try again")
        assert retry_delay(error) == 1.0
    assert await deployment.metric("fathom_requests_running") == 2
    deployment.engine.gate.set()
    for messages in await asyncio.gather(*waiting):
        assert messages[-1].finish_info.usage.num_generated_tokens == 3
    assert (await deployment.client.inference.Generate(request())).HasField("finish_info")


@pytest.mark.parametrize("starting", [{"max_waiting": 1}], indirect=True)
async def test_requests_with_a_token_wait_no_longer(deployment: Deployment) -> None:
    long = request()
    long.stop.max_tokens = 4000
    streams = []
    for _ in range(3):
        streams.append(deployment.client.inference.GenerateStream(long))
        assert (await streams[-1].read()).HasField("prompt_info")
        assert (await streams[-1].read()).HasField("delta")
    for stream in streams:
        stream.cancel()
    await deployment.engine.until_running(0)


async def test_a_dead_engine_is_started_again(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    stream = deployment.client.inference.GenerateStream(request())
    assert (await stream.read()).HasField("prompt_info")
    await deployment.engine.until_running(1)
    assert await deployment.metric("fathom_engine_up") == 1
    deployment.engine.num_failing_starts = 3
    deployment.engine.die()
    error = await failure(stream.read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert message_of(error) == "the engine has died; it is being started again"
    assert retry_delay(error) == 1.0
    assert await deployment.service.state_after(State.ENGINE_DOWN) is State.SERVING
    deployment.engine.gate.set()
    assert (await deployment.client.inference.Generate(request())).HasField("finish_info")
    assert deployment.engine.num_starts == 2
    assert await deployment.metric("fathom_engine_restarts_total") == 1
    assert await deployment.metric("fathom_engine_up") == 1
    status = await deployment.client.control.GetStatus(control_pb2.GetStatusRequest())
    assert status.num_engine_restarts == 1
    labels = {"depth": "8"}
    for method, code in (("GenerateStream", "UNAVAILABLE"), ("Generate", "OK")):
        labels["method"] = f"fathom.v1.Inference/{method}"
        assert await deployment.metric("fathom_requests_total", **labels, code=code) == 1


async def test_unary_calls_that_have_not_begun_outlive_the_engine(deployment: Deployment) -> None:
    inference = deployment.client.inference
    expected = await inference.Generate(request())
    scored = await inference.Score(inference_pb2.ScoreRequest(text="abc"))
    deployment.engine.gate.clear()
    calls = [
        asyncio.ensure_future(inference.Generate(request())),
        asyncio.ensure_future(inference.Score(inference_pb2.ScoreRequest(text="abc"))),
    ]
    await deployment.engine.until_running(2)
    deployment.engine.die()
    assert await deployment.service.state_after(State.SERVING) is State.ENGINE_DOWN
    deployment.engine.gate.set()
    again, scored_again = await asyncio.gather(*calls)
    assert deployment.engine.num_starts == 2
    assert (again.text, again.served) == (expected.text, expected.served)
    assert scored_again == scored


async def test_a_call_whose_first_tokens_are_lost_is_not_run_again(deployment: Deployment) -> None:
    long = request()
    long.stop.max_tokens = 4000
    call = asyncio.ensure_future(deployment.client.inference.Generate(long))
    await deployment.engine.until_running(1)
    while deployment.engine.num_steps < 3:
        await asyncio.sleep(0)
    deployment.engine.gate.clear()
    deployment.engine.die()
    error = await failure(call)
    assert message_of(error) == "the engine has died; it is being started again"
    assert len(deployment.engine.requests) == 1


async def test_a_call_that_kills_two_engines_is_given_up(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = asyncio.ensure_future(deployment.client.inference.Generate(request()))
    await deployment.engine.until_running(1)
    deployment.engine.die()
    while len(deployment.engine.requests) < 2:
        await asyncio.sleep(0.01)
    await deployment.engine.until_running(1)
    deployment.engine.die()
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert len(deployment.engine.requests) == 2


async def test_calls_do_not_wait_for_an_engine_that_cannot_be_started(
    deployment: Deployment,
) -> None:
    deployment.engine.gate.clear()
    calls = [
        asyncio.ensure_future(deployment.client.inference.Generate(request())) for _ in range(3)
    ]
    await deployment.engine.until_running(3)
    deployment.engine.num_failing_starts = 1
    deployment.engine.die()
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert message_of(error) == "the engine has died, and could not be started again"
        assert retry_delay(error) == 1.0


async def test_a_call_waits_for_the_engine_no_longer_than_its_deadline(
    deployment: Deployment,
) -> None:
    deployment.engine.gate.clear()
    deployment.engine.start_gate.clear()
    call = deployment.client.inference.Generate(request(), timeout=1.0)
    await deployment.engine.until_running(1)
    deployment.engine.die()
    error = await failure(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deployment.engine.start_gate.set()
    deployment.engine.gate.set()
    assert await deployment.service.state_after(State.ENGINE_DOWN) is State.SERVING
    assert len(deployment.engine.requests) == 1


async def test_an_idle_engine_is_watched(deployment: Deployment) -> None:
    deployment.engine.num_failing_starts = 10**6
    deployment.engine.die()
    assert await deployment.service.state_after(State.SERVING) is State.ENGINE_DOWN
    error = await failure(deployment.client.inference.Generate(request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert retry_delay(error) == 1.0
    assert await deployment.metric("fathom_engine_up") == 0
    # What needs no engine is still answered.
    model = await deployment.client.inference.GetModel(inference_pb2.GetModelRequest())
    assert model.model.num_layers == 8
    deployment.engine.num_failing_starts = 0
    assert await deployment.service.state_after(State.ENGINE_DOWN) is State.SERVING


async def test_a_death_during_calibration(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.control.Calibrate(control_pb2.CalibrateRequest())
    while not deployment.service.is_measuring:
        await asyncio.sleep(0.01)
    deployment.engine.die()
    error = await failure(call.read())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    deployment.engine.gate.set()
    while deployment.service.state is not State.SERVING:
        await deployment.service.state_after(deployment.service.state)
    assert (await deployment.client.inference.Generate(request())).HasField("finish_info")


async def test_a_draining_server_does_not_start_its_engine_again(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    call = deployment.client.inference.Generate(request())
    await deployment.engine.until_running(1)
    drain = asyncio.ensure_future(deployment.service.drain())
    assert await deployment.service.state_after(State.SERVING) is State.DRAINING
    deployment.engine.die()
    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
    assert await drain == 0
    assert deployment.service.state is State.DRAINING
    assert deployment.engine.num_starts == 1


async def test_a_server_that_is_stopped_while_it_starts_never_serves(
    starting: Deployment,
) -> None:
    assert await starting.service.drain() == 0
    await starting.open()
    assert starting.service.state is State.DRAINING


async def test_a_drained_server_takes_requests_again(deployment: Deployment) -> None:
    inference, control = deployment.client.inference, deployment.client.control
    deployment.engine.gate.clear()
    running = asyncio.ensure_future(inference.Generate(request()))
    await deployment.engine.until_running(1)
    drain = asyncio.ensure_future(control.Drain(control_pb2.DrainRequest(grace_seconds=600)))
    assert await deployment.service.state_after(State.SERVING) is State.DRAINING
    assert (await failure(inference.Generate(request()))).code() is grpc.StatusCode.UNAVAILABLE
    resumed = await control.Resume(control_pb2.ResumeRequest())
    assert resumed.state == control_pb2.GetStatusResponse.STATE_SERVING
    # Who waits for the drain learns that it has been given up.
    assert (await drain).num_unfinished == 1
    deployment.engine.gate.set()
    assert (await running).HasField("finish_info")
    assert (await inference.Generate(request())).HasField("finish_info")
    error = await failure(control.Resume(control_pb2.ResumeRequest()))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message_of(error) == "the server is not draining; it is serving"


async def test_an_engine_that_died_in_a_drain_is_started_by_resume(deployment: Deployment) -> None:
    control = deployment.client.control
    for number in (1, 2):
        await control.Drain(control_pb2.DrainRequest())
        deployment.engine.die()
        resumed = await control.Resume(control_pb2.ResumeRequest())
        assert resumed.state == control_pb2.GetStatusResponse.STATE_ENGINE_DOWN
        assert await deployment.service.state_after(State.ENGINE_DOWN) is State.SERVING
        generated = await deployment.client.inference.Generate(request())
        assert generated.HasField("finish_info")
        assert deployment.engine.num_starts == number + 1


async def test_a_server_that_is_being_stopped_does_not_resume(deployment: Deployment) -> None:
    assert await deployment.service.drain(for_good=True) == 0
    error = await failure(deployment.client.control.Resume(control_pb2.ResumeRequest()))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message_of(error) == "the server is being stopped"
    assert deployment.service.state is State.DRAINING


async def test_a_drain_of_a_server_that_starts_can_be_taken_back(starting: Deployment) -> None:
    control = starting.client.control
    await control.Drain(control_pb2.DrainRequest())
    resumed = await control.Resume(control_pb2.ResumeRequest())
    assert resumed.state == control_pb2.GetStatusResponse.STATE_STARTING
    await control.Drain(control_pb2.DrainRequest())
    await starting.open()
    assert starting.service.state is State.DRAINING
    await control.Resume(control_pb2.ResumeRequest())
    assert (await starting.client.inference.Generate(request())).HasField("finish_info")


async def test_what_follows_the_load_is_started_again(
    starting: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose, calls = AutoDepth.choose, asyncio.Queue[bool]()

    def failing_once(*arguments: Any, **options: Any) -> PresentLevels:
        calls.put_nowait(True)
        if not caplog.records:
            raise ZeroDivisionError("a mistake")
        return choose(*arguments, **options)

    monkeypatch.setattr(AutoDepth, "choose", failing_once)
    caplog.set_level(logging.CRITICAL)
    await starting.open()
    await calls.get()
    await calls.get()
    (record,) = caplog.records
    assert record.getMessage() == "automatic depth has died; it is started again in 1 s"
    assert "ZeroDivisionError: a mistake" in caplog.text
