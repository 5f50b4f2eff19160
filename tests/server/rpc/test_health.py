"""The health service."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2

from server.rpc.server import CONTROL, INFERENCE
from tests.server.rpc.conftest import Deployment, failure

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(deployment: Deployment, service: str) -> int:
    response = await deployment.client.health.Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def test_check_while_starting_and_serving(starting: Deployment) -> None:
    assert (INFERENCE, CONTROL) == ("fathom.v1.Inference", "fathom.v1.Control")
    assert await check(starting, "") == NOT_SERVING
    assert await check(starting, INFERENCE) == NOT_SERVING
    assert await check(starting, CONTROL) == SERVING
    watch = starting.client.health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert (await watch.read()).status == NOT_SERVING
    await starting.open()
    assert (await watch.read()).status == SERVING
    assert await check(starting, INFERENCE) == SERVING
    assert await check(starting, CONTROL) == SERVING
    watch.cancel()


async def test_an_unknown_service(deployment: Deployment) -> None:
    error = await failure(check(deployment, "fathom.v1.Oracle"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", ["", INFERENCE])
async def test_watch_follows_the_state(starting: Deployment, service: str) -> None:
    watch = starting.client.health.Watch(health_pb2.HealthCheckRequest(service=service))

    async def next_status() -> int:
        return int((await watch.read()).status)

    assert await next_status() == NOT_SERVING
    await starting.open()
    assert await next_status() == SERVING
    starting.engine.num_failing_starts = 1
    starting.engine.die()
    assert await next_status() == NOT_SERVING
    assert await next_status() == SERVING
    assert await starting.service.drain() == 0
    assert await next_status() == NOT_SERVING


async def test_control_stays_until_the_server_stops(deployment: Deployment) -> None:
    watch = deployment.client.health.Watch(health_pb2.HealthCheckRequest(service=CONTROL))
    assert (await watch.read()).status == SERVING
    await deployment.service.drain()
    assert await check(deployment, CONTROL) == SERVING
    await deployment.rpc.stop()
    assert (await watch.read()).status == NOT_SERVING


async def test_watchers_do_not_hold_up_the_stop(deployment: Deployment) -> None:
    watches = [
        deployment.client.health.Watch(health_pb2.HealthCheckRequest(service=name))
        for name in ("", INFERENCE, CONTROL)
    ]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    await deployment.service.drain()
    await deployment.rpc.stop()
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
        error = await failure(watch.read())
        assert error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
