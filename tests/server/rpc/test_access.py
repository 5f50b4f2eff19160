"""TLS, client certificates and tokens over real sockets, and their change while calls run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from server.call_record import CallRecord
from server.certificates import CertificateFiles
from server.errors import InvalidArgument
from server.rpc.access import AccessFiles
from server.rpc.client import AsyncClient, CallError, Client
from server.rpc.client_tls import ClientTls
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from tests.server.authority import Authority
from tests.server.rpc.conftest import collect, failure
from tests.server.rpc.secured import Secured, secured

FATHOM = Path(sys.executable).with_name("fathom")
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


@pytest.fixture
def clients_file(tmp_path: Path) -> Path:
    return written(tmp_path / "clients", CLIENTS)


@pytest.fixture
async def with_tokens(clients_file: Path) -> AsyncIterator[Secured]:
    async with secured(AccessFiles(clients=clients_file)) as deployment:
        yield deployment


# Tokens


async def test_permissions(with_tokens: Secured) -> None:
    assert await with_tokens.use(generate, token=ALICE)
    assert await with_tokens.use(get_status, token=OPS)
    assert await with_tokens.use(code_of(get_status), token=ALICE) == (
        "PERMISSION_DENIED",
        "client alice lacks the permission control",
    )
    assert await with_tokens.use(code_of(generate), token=OPS) == (
        "PERMISSION_DENIED",
        "client ops lacks the permission inference",
    )
    assert len(with_tokens.engine.requests) == 1
    for code, method in (
        ("OK", "fathom.v1.Control/GetStatus"),
        ("PERMISSION_DENIED", "fathom.v1.Control/GetStatus"),
        ("PERMISSION_DENIED", "fathom.v1.Inference/Generate"),
    ):
        labels = {"method": method, "depth": "", "code": code}
        assert await with_tokens.metric("fathom_requests_total", **labels) == 1


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "authorization: a bearer token is needed"),
        (f"Bearer {NOBODY}", "authorization: no client has this token"),
        (f"Bearer {ALICE}0", "authorization: no client has this token"),
        (f"Basic {ALICE}", "authorization: allowed: Bearer with a token, once"),
        (ALICE, "authorization: allowed: Bearer with a token, once"),
        ("Bearer ", "authorization: allowed: Bearer with a token, once"),
    ],
)
async def test_unknown_callers(with_tokens: Secured, header: str | None, message: str) -> None:
    metadata = [] if header is None else [("authorization", header)]
    client = with_tokens.client
    for call in (
        client.inference.Generate(REQUEST, metadata=metadata),
        collect(client.inference.GenerateStream(REQUEST, metadata=metadata)),
        client.inference.GetModel(inference_pb2.GetModelRequest(), metadata=metadata),
        client.control.Drain(control_pb2.DrainRequest(), metadata=metadata),
    ):
        error = await failure(call)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, message)
    assert with_tokens.engine.requests == []
    assert not with_tokens.service.status().load.num_running


async def test_two_tokens_are_none(with_tokens: Secured) -> None:
    metadata = [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {OPS}")]
    error = await failure(with_tokens.client.inference.Generate(REQUEST, metadata=metadata))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_message_of_an_unknown_caller_is_not_even_decoded(with_tokens: Secured) -> None:
    async with grpc.aio.insecure_channel(with_tokens.address) as channel:
        call: Any = channel.unary_unary("/fathom.v1.Inference/Generate")
        error = await failure(call(b"\xff\xff"))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = [("authorization", f"bearer {ALICE}")]
        error = await failure(call(b"\xff\xff", metadata=metadata))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_is_open_and_reflection_is_not(with_tokens: Secured) -> None:
    assert await with_tokens.use(lambda client: client.health()) == "SERVING"
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(with_tokens.address) as channel:
        reflect = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def ask(token: str | None) -> int:
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            (answer,) = [each async for each in reflect(iter([question]), metadata=metadata)]
            return len(answer.list_services_response.service)

        assert await ask(OPS) == await ask(ALICE) == 4
        for token in (None, NOBODY):
            error = await failure(ask(token))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_who_called_is_noted(clients_file: Path) -> None:
    records: list[CallRecord] = []
    async with secured(AccessFiles(clients=clients_file), observers=(records.append,)) as each:
        await each.use(generate, token=ALICE)
        await each.use(code_of(generate), token=NOBODY)
    assert [(record.caller.client, record.code) for record in records] == [
        ("alice", "OK"),
        ("127.0.0.1", "UNAUTHENTICATED"),
    ]


async def test_tokens_change_while_calls_run(
    with_tokens: Secured, clients_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_tokens.engine.gate.clear()
    stream = with_tokens.client.inference.GenerateStream(
        REQUEST, metadata=[("authorization", f"Bearer {ALICE}")]
    )
    running = asyncio.create_task(collect(stream))
    await with_tokens.engine.until_running(1)

    written(clients_file, f"bob inference {NOBODY}\n")
    metadata = [("authorization", f"Bearer {NOBODY}")]

    async def is_known() -> bool:
        try:
            await with_tokens.client.inference.GetModel(
                inference_pb2.GetModelRequest(), metadata=metadata
            )
        except grpc.aio.AioRpcError:
            return False
        return True

    await until(is_known)
    assert (await with_tokens.use(code_of(generate), token=ALICE))[0] == "UNAUTHENTICATED"

    written(clients_file, f"bob inference {NOBODY}\ncarol everything {OPS}\n")
    await until(lambda: "line 2: permissions: got 'everything'" in caplog.text)
    assert OPS not in caplog.text
    assert await is_known()

    with_tokens.engine.gate.set()
    messages = await running
    assert messages[-1].HasField("finish_info")


# TLS


class Deployed:
    """Files of a server, and what its clients have."""

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


@pytest.fixture
def deployed(tmp_path: Path) -> Deployed:
    return Deployed(tmp_path)


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


async def test_streams_of_one_connection_are_bounded() -> None:
    """The others wait in the client."""
    async with secured(AccessFiles(), max_concurrent_streams=2) as server:
        # From the first answer on, the client knows of the limit.
        await server.client.control.GetStatus(control_pb2.GetStatusRequest())
        server.engine.gate.clear()
        calls = [
            asyncio.create_task(collect(server.client.inference.GenerateStream(REQUEST)))
            for _ in range(5)
        ]
        await server.engine.until_running(2)
        # A call of another connection overtakes the three that wait.
        await server.use(get_status)
        assert len(server.engine.requests) == 2
        server.engine.gate.set()
        for messages in await asyncio.gather(*calls):
            assert messages[-1].HasField("finish_info")


async def test_streams_that_wait_in_the_client_are_not_refused() -> None:
    """However close one follows on the end of another."""
    async with secured(AccessFiles(), max_concurrent_streams=8) as server:

        async def work() -> None:
            for _ in range(10):
                messages = await collect(server.client.inference.GenerateStream(REQUEST))
                assert messages[-1].HasField("finish_info")

        await asyncio.gather(*[work() for _ in range(24)])


async def test_old_connections_are_replaced_and_their_calls_finished() -> None:
    records: list[CallRecord] = []
    async with secured(
        AccessFiles(), observers=(records.append,), max_connection_age_seconds=1
    ) as server:
        status = server.client.control.GetStatus
        await status(control_pb2.GetStatusRequest())
        server.engine.gate.clear()
        stream = asyncio.create_task(collect(server.client.inference.GenerateStream(REQUEST)))
        await server.engine.until_running(1)

        async def is_new() -> bool:
            await status(control_pb2.GetStatusRequest())
            return records[-1].caller.peer != records[0].caller.peer

        await until(is_new)
        server.engine.gate.set()
        assert (await stream)[-1].HasField("finish_info")
        assert records[-1].caller.peer == records[0].caller.peer


async def test_a_message_that_grows_when_it_is_unpacked_is_refused() -> None:
    async with secured(AccessFiles(), max_message_bytes=2**20) as server:
        bomb = inference_pb2.GenerateRequest(prompt="a" * 2**26)
        error = await failure(
            server.client.inference.Generate(bomb, compression=grpc.Compression.Gzip)
        )
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.engine.requests == []
        assert await server.use(generate)


# The command


async def fathom(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if "FATHOM" not in name}
    return await asyncio.to_thread(
        subprocess.run,
        [FATHOM, *arguments],
        capture_output=True,
        text=True,
        env={**inherited, "COLUMNS": "200", **variables},
        check=False,
    )


async def test_the_command(deployed: Deployed, tmp_path: Path) -> None:
    text = f"{CLIENTS}batch inference certificate:batch.internal\n"
    files = AccessFiles(deployed.mutual.certificates, written(tmp_path / "clients", text))
    ca = tmp_path / "ca.crt"
    ca.write_bytes(deployed.authority.pem)
    certificate, key = deployed.client_authority.issue("batch.internal").write(tmp_path, "batch")
    token_file = written(tmp_path / "token", f"{ALICE}\n")
    async with secured(files) as server:
        base = {"FATHOM_ADDRESS": server.address, "FATHOM_TLS_CA": str(ca)}
        mutual = {
            **base,
            "FATHOM_CLIENT_CERTIFICATE": str(certificate),
            "FATHOM_CLIENT_KEY": str(key),
        }
        asked = "generate", "Once", "--max-tokens", "3"
        results = await asyncio.gather(
            fathom("health", **mutual),
            fathom("model", "--token-file", token_file, **mutual),
            fathom(*asked, FATHOM_TOKEN=ALICE, **mutual),
            fathom(*asked, **mutual),
            fathom(*asked, FATHOM_TOKEN=OPS, **mutual),
            fathom(*asked, FATHOM_TOKEN=NOBODY, **mutual),
            fathom(*asked, **base),
        )
        assert [result.returncode for result in results] == [0, 0, 0, 0, 1, 1, 1], results
        assert results[0].stdout == "SERVING\n"
        assert "toy: ToyForCausalLM" in results[1].stdout
        assert results[2].stdout == results[3].stdout
        assert [result.stderr.split(":")[1].strip() for result in results[4:]] == [
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "UNAVAILABLE",
        ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--client-key", "x"], "--client-certificate and --client-key need each other"),
        (["--tls-ca", "/no/such/file"], "--tls-ca: /no/such/file: No such file or directory"),
        (["--token-file", "/no/such/file"], "--token-file: /no/such/file: No such file"),
    ],
)
async def test_what_the_command_refuses(arguments: list[str], problem: str) -> None:
    result = await fathom("health", *arguments)
    assert result.returncode == 2
    assert problem in " ".join(result.stderr.replace("│", " ").split())


async def test_a_handshake_that_fails_is_told(deployed: Deployed, tmp_path: Path) -> None:
    ca = tmp_path / "other.crt"
    ca.write_bytes(Authority("other").pem)
    async with secured(deployed.tls) as server:
        result = await fathom("health", "--address", server.address, "--tls-ca", ca)
    assert result.returncode == 1
    assert f"the TLS handshake with {server.address} failed" in result.stderr
    assert "CERTIFICATE_VERIFY_FAILED" in result.stderr
