"""Tokens and certificates of clients, and calls that use them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from server.access.certificates import CertificateFiles
from server.rpc.access import AccessFiles
from server.rpc.client import CallError, Client
from server.rpc.client_tls import ClientTls
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.server.access.authority import Authority

ALICE, OPS, NOBODY = "token-of-alice-000", "token-of-ops-000000", "token-of-nobody-00"
CLIENTS = f"alice inference {ALICE}\nops control {OPS}\n"
REQUEST = inference_pb2.GenerateRequest(
    prompt="Once", stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True)
)


def generate(client: Client) -> str:
    return client.generate(REQUEST).text


def get_status(client: Client) -> int:
    return client.get_status().state


def code_of(function: Callable[[Client], object]) -> Callable[[Client], tuple[str, str]]:
    """Turn a call that must fail into one that returns its code and message."""

    def call(client: Client) -> tuple[str, str]:
        with pytest.raises(CallError) as caught:
            function(client)
        return caught.value.code, caught.value.message

    return call


def written(path: Path, text: str) -> Path:
    """Replace a file of secrets as a whole, as careful operators do."""
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    return fresh.replace(path)


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.01)


class Deployed:
    """Files of a server, and the credentials of its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        certificate, key = self.authority.issue("server").write(directory, "server")
        self.client_ca = directory / "client-ca.crt"
        self.client_authority = Authority("clients")
        self.client_ca.write_bytes(self.client_authority.pem)
        self.tls = AccessFiles(CertificateFiles(certificate, key))
        self.mutual = AccessFiles(CertificateFiles(certificate, key, self.client_ca))

    @property
    def trusting(self) -> ClientTls:
        return ClientTls(ca=self.authority.pem)

    def identified(self, name: str = "batch.internal") -> ClientTls:
        issued = self.client_authority.issue(name)
        return ClientTls(self.authority.pem, issued.certificate, issued.key)
