"""TLS and client certificates over real sockets, and their change while calls run."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import replace
from pathlib import Path

import pytest

from server.calls.call_record import CallRecord
from server.errors import InvalidArgument
from server.rpc.access import AccessFiles
from server.rpc.client import AsyncClient
from server.rpc.client_tls import ClientTls
from tests.server.access.authority import Authority
from tests.server.rpc.conftest import collect
from tests.server.rpc.credentials import (
    ALICE,
    CLIENTS,
    NOBODY,
    REQUEST,
    Deployed,
    code_of,
    generate,
    get_status,
    until,
    written,
)
from tests.server.rpc.secured import secured


async def test_tls(deployed: Deployed) -> None:
    async with secured(deployed.tls) as server:
        assert await server.use(generate, tls=deployed.trusting)
        for tls in (None, ClientTls(ca=Authority().pem)):
            code, _ = await server.use(code_of(generate), tls=tls)
            assert code == "UNAVAILABLE"
        name = ClientTls(ca=deployed.authority.pem, server_name="server")
        assert await server.use(generate, tls=name)
        other = ClientTls(ca=deployed.authority.pem, server_name="another.example")
        assert (await server.use(code_of(generate), tls=other))[0] == "UNAVAILABLE"
        expiry = await server.metric(
            "fathom_tls_certificate_expiry_timestamp_seconds", certificate="server"
        )
        assert deployed.tls.certificates is not None
        assert expiry == deployed.tls.certificates.load().expires.timestamp()


async def test_mutual_tls(deployed: Deployed) -> None:
    records: list[CallRecord] = []
    async with secured(deployed.mutual, observers=(records.append,)) as server:
        assert await server.use(generate, tls=deployed.identified())
        assert await server.use(code_of(get_status), tls=deployed.identified()) == (
            "PERMISSION_DENIED",
            "client batch.internal lacks the permission control",
        )
        stranger = Authority().issue("batch.internal")
        strange = ClientTls(deployed.authority.pem, stranger.certificate, stranger.key)
        for tls in (deployed.trusting, strange):
            assert (await server.use(code_of(generate), tls=tls))[0] == "UNAVAILABLE"
    assert [record.caller.client for record in records] == ["batch.internal"] * 2


async def test_certificates_with_permissions(deployed: Deployed, tmp_path: Path) -> None:
    text = f"{CLIENTS}batch control,inference certificate:batch.internal\n"
    clients = written(tmp_path / "clients", text)
    files = AccessFiles(deployed.mutual.certificates, clients)
    async with secured(files) as server:
        batch, other = deployed.identified(), deployed.identified("other.internal")
        assert await server.use(generate, tls=batch)
        assert await server.use(get_status, tls=batch)
        assert (await server.use(code_of(generate), tls=other))[0] == "UNAUTHENTICATED"
        assert await server.use(generate, tls=other, token=ALICE)
        # The token is what counts where there is one, and a wrong one is not passed over.
        assert (await server.use(code_of(get_status), tls=batch, token=ALICE))[0] == (
            "PERMISSION_DENIED"
        )
        assert (await server.use(code_of(generate), tls=batch, token=NOBODY))[0] == (
            "UNAUTHENTICATED"
        )
    with pytest.raises(InvalidArgument, match="tokens alone, unless tls_client_ca is set"):
        AccessFiles(deployed.tls.certificates, clients).load()


async def test_certificates_change_while_streams_run(
    deployed: Deployed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server")
    certificates = deployed.tls.certificates
    assert certificates is not None
    async with secured(deployed.tls) as server:
        server.engine.gate.clear()
        async with AsyncClient(server.address, tls=deployed.trusting) as client:
            streams = [
                asyncio.create_task(collect(client.inference.GenerateStream(REQUEST)))
                for _ in range(8)
            ]
            await server.engine.until_running(8)

            # First something broken: the key does not come along.
            successor = Authority("successor")
            issued = successor.issue("server")
            certificates.certificate.write_bytes(issued.certificate)
            await until(lambda: "tls_key: got" in caplog.text)
            assert "what was read before stays in force" in caplog.text
            assert await server.use(get_status, tls=deployed.trusting)

            certificates.key.write_bytes(issued.key)
            await until(lambda: "have been read again" in caplog.text)
            # Now the new authority's alone; connections that are open go on.
            assert await server.use(get_status, tls=ClientTls(ca=successor.pem))
            assert (await server.use(code_of(get_status), tls=deployed.trusting))[0] == (
                "UNAVAILABLE"
            )
            server.engine.gate.set()
            for messages in await asyncio.gather(*streams):
                assert messages[-1].HasField("finish_info")


async def test_authorities_of_clients_change(
    deployed: Deployed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server")
    async with secured(deployed.mutual) as server:
        old = deployed.identified()
        assert await server.use(generate, tls=old)
        deployed.client_authority = Authority("next clients")
        deployed.client_ca.write_bytes(deployed.client_authority.pem)
        await until(lambda: "have been read again" in caplog.text)
        assert await server.use(generate, tls=deployed.identified())
        assert (await server.use(code_of(generate), tls=old))[0] == "UNAVAILABLE"


async def test_a_certificate_that_is_not_valid_yet_comes_into_force_once_it_is(
    deployed: Deployed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server")
    async with secured(deployed.tls) as server:
        successor = Authority("successor")
        begins = datetime.timedelta(seconds=2)
        successor.issue("server", begins=begins).write(deployed.directory, "server")
        await until(lambda: "allowed: one valid now" in caplog.text)
        assert await server.use(get_status, tls=deployed.trusting)
        await until(lambda: "certificate and key have been read again" in caplog.text)
        assert await server.use(get_status, tls=ClientTls(ca=successor.pem))
        assert caplog.text.count("allowed: one valid now") == 1


async def test_a_broken_file_does_not_hold_back_the_others(
    deployed: Deployed, clients_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server")
    files = AccessFiles(deployed.mutual.certificates, clients_file)
    async with secured(files) as server:
        deployed.client_ca.write_bytes(b"-----BEGIN CERTIFI")
        await until(lambda: "tls_client_ca: got" in caplog.text)
        written(clients_file, f"bob inference {NOBODY}\n")
        await until(lambda: "clients have been read again" in caplog.text)
        successor = Authority("successor")
        successor.issue("server").write(deployed.directory, "server")
        await until(lambda: "certificate and key have been read again" in caplog.text)

        def identity() -> ClientTls:
            return replace(deployed.identified(), ca=successor.pem)

        # The authorities of before are in force.
        assert await server.use(generate, tls=identity(), token=NOBODY)
        deployed.client_authority = Authority("next clients")
        deployed.client_ca.write_bytes(deployed.client_authority.pem)
        await until(lambda: "authorities have been read again" in caplog.text)
        assert await server.use(generate, tls=identity(), token=NOBODY)


async def test_protection_does_not_vanish_without_a_restart(
    deployed: Deployed, clients_file: Path
) -> None:
    files = AccessFiles(deployed.mutual.certificates, clients_file)
    async with secured(files) as server:
        for changed, setting in (
            (AccessFiles(None, clients_file), "tls_certificate"),
            (AccessFiles(deployed.tls.certificates, clients_file), "tls_client_ca"),
            (AccessFiles(deployed.mutual.certificates, None), "clients"),
        ):
            with pytest.raises(InvalidArgument, match=f"^{setting}: got 'none'"):
                server.access.prepare(changed)
