"""The address that a call comes from."""

from __future__ import annotations

import pytest

from server.calls.caller import Caller, current_caller
from server.calls.generation import Generation
from server.rpc.generated.fathom.v1 import inference_pb2
from server.rpc.peer import host_of, peer_address
from tests.server.rpc.conftest import Deployment


@pytest.mark.parametrize(
    ("peer", "address", "host"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B::1%5D:4711", "[::1]:4711", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "[fe80::1%eth0]:4711", "fe80::1%eth0"),
        ("unix:/run/fathom.socket", "unix:/run/fathom.socket", "unix:/run/fathom.socket"),
        ("unknown", "unknown", "unknown"),
    ],
)
def test_address_and_host(peer: str, address: str, host: str) -> None:
    assert peer_address(peer) == address
    assert host_of(address) == host


async def test_the_service_knows_who_calls(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[Caller] = []
    generate = deployment.service.inference.generate

    def noting(request: Generation, **options: object) -> object:
        callers.append(current_caller())
        return generate(request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(deployment.service.inference, "generate", noting)
    request = inference_pb2.GenerateRequest(
        prompt="Once", stop=inference_pb2.StopConditions(max_tokens=1)
    )
    await deployment.client.inference.Generate(request)
    (caller,) = callers
    assert caller.client == "127.0.0.1"
    assert host_of(caller.peer) == "127.0.0.1"
    assert caller.peer != caller.client
    assert current_caller() == Caller()
