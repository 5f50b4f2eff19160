"""Limits on connections, on the calls of one and on the size of messages."""

from __future__ import annotations

import asyncio

import grpc

from server.calls.call_record import CallRecord
from server.rpc.access import AccessFiles
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from tests.server.rpc.conftest import collect, failure
from tests.server.rpc.credentials import (
    REQUEST,
    generate,
    get_status,
    until,
)
from tests.server.rpc.secured import secured


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
