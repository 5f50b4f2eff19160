"""Tokens over real sockets, and their change while calls run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from server.calls.call_record import CallRecord
from server.rpc.access import AccessFiles
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from tests.server.rpc.conftest import collect, failure
from tests.server.rpc.credentials import (
    ALICE,
    NOBODY,
    OPS,
    REQUEST,
    code_of,
    generate,
    get_status,
    until,
    written,
)
from tests.server.rpc.secured import Secured, secured


@pytest.fixture
async def with_tokens(clients_file: Path) -> AsyncIterator[Secured]:
    async with secured(AccessFiles(clients=clients_file)) as deployment:
        yield deployment


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


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_health_is_open_and_reflection_is_not(with_tokens: Secured, version: str) -> None:
    assert await with_tokens.use(lambda client: client.health()) == "SERVING"
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(with_tokens.address) as channel:
        reflect = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def ask(token: str | None) -> int:
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            (answer,) = [each async for each in reflect(iter([question]), metadata=metadata)]
            return len(answer.list_services_response.service)

        assert await ask(OPS) == await ask(ALICE) == 5
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


async def test_callers_that_are_not_known_may_infer_alone() -> None:
    async with secured(AccessFiles(), anonymous_control=False) as each:
        assert await each.use(generate)
        assert await each.use(lambda client: client.get_model().num_layers) == 8
        for call in (
            each.client.control.GetStatus(control_pb2.GetStatusRequest()),
            each.client.control.Drain(control_pb2.DrainRequest()),
            each.client.control.Resume(control_pb2.ResumeRequest()),
            collect(each.client.control.Calibrate(control_pb2.CalibrateRequest())),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.details() == (
                "callers that are not known lack the permission control; the server's settings "
                "clients and anonymous_control say who has it"
            )
        assert await each.use(generate)


async def test_known_clients_keep_their_permissions(clients_file: Path) -> None:
    async with secured(AccessFiles(clients=clients_file), anonymous_control=False) as each:
        assert await each.use(get_status, token=OPS)
