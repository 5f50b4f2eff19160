"""Who may call: keys, certificates, hosts, pages of other sites."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.access.authenticator import Authenticator
from server.access.certificates import CertificateFiles, Certificates
from server.access.clients import load_clients
from server.calls.caller import Caller
from server.openai.tls import HttpTls
from server.rpc.access import Access
from server.telemetry.metrics import Metrics
from tests.server.access.authority import Authority
from tests.server.openai.conftest import HttpDeployment, http_deployment, until_recorded
from tests.server.openai.test_completions import asked
from tests.server.rpc.credentials import ALICE, CLIENTS, NOBODY, OPS, Deployed, until, written

BODY = {"prompt": "Once", "max_tokens": 2}


async def test_keys_are_the_tokens_of_clients(vllm_config: Any, tmp_path: Path) -> None:
    clients = written(tmp_path / "clients", CLIENTS)
    async with http_deployment(vllm_config, clients=clients) as deployment:
        await deployment.open()
        async with deployment.openai(ALICE) as client:
            await client.completions.create(**asked())
        assert (await until_recorded(deployment)).caller.client == "alice"
        (request,) = deployment.engine.requests
        assert request.cache_namespace is not None
        assert (request.cache_namespace.kind, request.cache_namespace.name) == ("client", "alice")
        async with deployment.openai(NOBODY) as client:
            with pytest.raises(openai.AuthenticationError, match="no client has this token"):
                await client.models.list()
        async with deployment.openai(OPS) as client:
            with pytest.raises(
                openai.PermissionDeniedError, match="lacks the permission inference"
            ):
                await client.completions.create(**asked())
        async with deployment.raw() as client:
            for path in ("/v1/models", "/v1/models/toy", "/v1/other", "/docs"):
                refused = await client.get(path)
                assert refused.status_code == 401, path
                assert refused.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/health")).status_code == 200
            basic = await client.get("/v1/models", headers={"authorization": "Basic abc"})
            assert basic.status_code == 401
        assert [record.code for record in deployment.records[1:3]] == [
            "UNAUTHENTICATED",
            "PERMISSION_DENIED",
        ]


async def test_callers_without_a_name_are_their_addresses(deployment: HttpDeployment) -> None:
    await deployment.post("/v1/completions", BODY)
    record = await until_recorded(deployment)
    assert record.caller == Caller("127.0.0.1", record.caller.peer)
    assert record.caller.peer.startswith("127.0.0.1:")


async def test_the_salt_of_a_client_splits_its_own_cache(deployment: HttpDeployment) -> None:
    await deployment.post("/v1/completions", {**BODY, "cache_salt": "mine"})
    (request,) = deployment.engine.requests
    assert request.cache_salt == "mine"
    assert request.cache_namespace is not None
    assert request.cache_namespace.kind == "address"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:5", 200),
        ("evil.example.org", 403),
        ("127.0.0.1.evil.example.org", 403),
    ],
)
async def test_the_host_must_be_a_name_of_this_machine(
    deployment: HttpDeployment, host: str, status: int
) -> None:
    response = await deployment.post("/v1/completions", BODY, headers={"host": host})
    assert response.status_code == status


async def test_pages_of_other_sites_may_not_call_unless_they_are_named(vllm_config: Any) -> None:
    origin = "https://chat.example.org"
    ask = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    for allowed in ((), (origin,)):
        async with http_deployment(vllm_config, allow_origins=allowed) as deployment:
            await deployment.open()
            async with deployment.raw() as client:
                asked_first = await client.options("/v1/completions", headers=ask)
                answer = await client.post("/v1/completions", json=BODY, headers={"origin": origin})
                other = await client.get("/v1/models", headers={"origin": "https://other.org"})
            expected = origin if allowed else None
            assert asked_first.headers.get("access-control-allow-origin") == expected
            assert answer.headers.get("access-control-allow-origin") == expected
            assert "access-control-allow-origin" not in other.headers


def trusting(authority: Authority, files: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if files is not None:
        context.load_cert_chain(*files)
    return context


async def test_tls_from_the_files_of_grpc_which_are_read_again(
    vllm_config: Any, tmp_path: Path
) -> None:
    deployed = Deployed(tmp_path)
    assert deployed.tls.certificates is not None
    tls = HttpTls(deployed.tls.certificates.load())
    async with http_deployment(vllm_config, tls=tls) as deployment:
        await deployment.open()
        base = f"https://localhost:{deployment.http.port}"
        assert deployment.http.url.startswith("https://")
        async with deployment.raw(base_url=base, verify=trusting(deployed.authority)) as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
            other = Authority("another")
            certificate, key = other.issue("server").write(tmp_path, "server")
            tls.install(CertificateFiles(certificate, key).load())
            assert (await client.get("/v1/models")).status_code == 200, "the connection stays"
        async with deployment.raw(base_url=base, verify=trusting(other)) as client:
            assert (await client.get("/v1/models")).status_code == 200, "a new one has the new"


async def test_clients_by_certificate(vllm_config: Any, tmp_path: Path) -> None:
    deployed = Deployed(tmp_path)
    assert deployed.mutual.certificates is not None
    clients = written(tmp_path / "clients", "batch inference certificate:batch.internal\n")
    authenticator = Authenticator(load_clients(clients), requires_certificates=True)
    tls = HttpTls(deployed.mutual.certificates.load())
    async with http_deployment(vllm_config, tls=tls, authenticator=authenticator) as deployment:
        await deployment.open()
        base = f"https://localhost:{deployment.http.port}"
        for name, status in (("batch.internal", 200), ("other.internal", 401)):
            files = deployed.client_authority.issue(name).write(tmp_path, name)
            context = trusting(deployed.authority, files)
            async with deployment.raw(base_url=base, verify=context) as client:
                answer = await client.post("/v1/completions", json=BODY)
            assert answer.status_code == status, answer.text
        assert (await until_recorded(deployment)).caller.client == "batch"
        async with deployment.raw(base_url=base, verify=trusting(deployed.authority)) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/v1/models")


async def test_files_that_change_reach_all_that_listen(tmp_path: Path) -> None:
    deployed = Deployed(tmp_path)
    access = Access(deployed.tls, Metrics())
    found: list[Certificates] = []
    access.add_follower(found.append)
    following = asyncio.create_task(access.follow(seconds=0.01))
    fresh = deployed.authority.issue("server")
    fresh.write(tmp_path, "server")
    await until(lambda: any(each.chain == fresh.certificate for each in found))
    assert access.certificates == found[-1]
    following.cancel()
