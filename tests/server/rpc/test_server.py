"""Addresses on which the server listens."""

from __future__ import annotations

import pytest

from server.errors import InvalidArgument
from server.rpc.server import RpcServer
from server.serving.service import Service
from server.telemetry.metrics import Metrics
from tests.server.rpc.conftest import Deployment
from tests.server.rpc.toy_engine import ToyEngine


async def refusal(host: str, port: int) -> InvalidArgument:
    service = Service(ToyEngine(), Metrics())
    with pytest.raises(InvalidArgument) as caught:
        await RpcServer(service, host, port).start()
    await service.close()
    return caught.value


async def test_a_port_in_use_is_named(starting: Deployment) -> None:
    error = await refusal("127.0.0.1", starting.rpc.port)
    assert str(error) == (
        f"port: got {starting.rpc.port}, allowed: a port that is free on 127.0.0.1 "
        "(Address already in use)"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
async def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    error = await refusal(host, 0)
    assert error.field == "host"
    assert error.value == host


async def test_ipv6() -> None:
    service = Service(ToyEngine(), Metrics())
    server = RpcServer(service, "::1", 0)
    try:
        await server.start()
    except InvalidArgument as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert server.port > 0
    await server.stop()
    await service.close()
