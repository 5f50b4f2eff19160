"""Repair as clients and operators see it, and an engine that loses its maps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from server.depth.levels import DepthPair
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.rpc.server import RpcServer
from server.serving.service import Service
from tests.server.calibration.repairing_engine import RepairingEngine
from tests.server.rpc.conftest import failure, message_of
from tests.server.rpc.credentials import until
from tests.server.rpc.toy_engine import NUM_LAYERS
from tests.server.test_startup import Start

CLOSED_FORM = common_pb2.STAND_IN_CLOSED_FORM
NONE = common_pb2.STAND_IN_NONE


@dataclass
class Repaired:
    """A server whose toy engine repairs what it skips."""

    engine: RepairingEngine
    service: Service
    client: AsyncClient
    maps: Path

    async def status(self) -> control_pb2.GetStatusResponse:
        reply: control_pb2.GetStatusResponse = await self.client.control.GetStatus(
            control_pb2.GetStatusRequest()
        )
        return reply

    async def model(self) -> inference_pb2.Model:
        reply: inference_pb2.GetModelResponse = await self.client.inference.GetModel(
            inference_pb2.GetModelRequest()
        )
        return reply.model

    def value(self, name: str, **labels: str) -> float | None:
        return self.service.metrics.registry.get_sample_value(name, labels)

    async def until_in_force(self, kind: common_pb2.StandIn) -> None:
        while (await self.status()).repair_in_force != kind:
            await asyncio.sleep(0.01)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Repaired]:
    engine = RepairingEngine()
    start = Start(tmp_path, engine=engine, repair="closed-form", first_restart_delay=0.01)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(start.service.close)
        await start.startup.run()
        rpc = RpcServer(start.service, "127.0.0.1", 0, max_message_bytes=2**20)
        await rpc.start()
        stack.push_async_callback(rpc.stop)
        client = AsyncClient(f"127.0.0.1:{rpc.port}")
        stack.push_async_callback(client.close)
        [maps] = tmp_path.glob("repair-*.safetensors")
        yield Repaired(engine, start.service, client, maps)


def request(**depth: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="Once",
        depth=common_pb2.Depth(**depth),  # type: ignore[arg-type]
        stop=inference_pb2.StopConditions(max_tokens=3, ignore_eos=True),
    )


async def test_repair_is_seen_everywhere(server: Repaired) -> None:
    model = await server.model()
    assert model.repair.kind == CLOSED_FORM
    assert model.repair.fingerprint == server.engine.installed
    assert model.repair.num_bytes == NUM_LAYERS * 4 * 4 * 4
    assert dict(model.repair.unexplained) == dict.fromkeys(range(NUM_LAYERS), 0.5)
    assert model.repair.kl_nats == pytest.approx(model.repair.kl_nats_without / 2)
    stand_ins = {level.name: level.stand_in for level in model.levels}
    assert stand_ins == {"dense": NONE, "fast": CLOSED_FORM, "generative": CLOSED_FORM}
    status = await server.status()
    assert (status.repair_wanted, status.repair_in_force) == (CLOSED_FORM, CLOSED_FORM)
    assert status.repair_problem == ""
    assert server.value("fathom_repair_up") == 1
    for depth, stand_in in ((8, NONE), (3, CLOSED_FORM)):
        answer = await server.client.inference.Generate(request(layers=depth))
        assert answer.served.stand_in == stand_in
        assert answer.prompt_info.served == answer.finish_info.served == answer.served
    scored = await server.client.inference.Score(
        inference_pb2.ScoreRequest(text="abc", depth=common_pb2.Depth(layers=3))
    )
    assert scored.served.stand_in == CLOSED_FORM


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_maps_that_an_engine_cannot_load_again(
    server: Repaired, caplog: pytest.LogCaptureFixture, is_deleted: bool
) -> None:
    caplog.set_level(logging.INFO)
    await until(lambda: not server.service.status().unmeasured)
    before = server.service.policy
    fast = DepthPair(4, 4)
    server.engine.fit_gate.clear()
    server.engine.gate.clear()
    running = asyncio.ensure_future(server.client.inference.Generate(request(level="fast")))
    await server.engine.until_running(1)
    if is_deleted:
        server.maps.unlink()
    else:
        server.maps.write_bytes(server.maps.read_bytes()[:-1])
    server.engine.die()
    server.engine.gate.set()

    # What was running with the maps runs again without them.
    answer = await running
    assert answer.served.stand_in == NONE
    status = await server.status()
    assert (status.repair_wanted, status.repair_in_force) == (CLOSED_FORM, NONE)
    assert "could not be loaded" in status.repair_problem
    assert "could not be loaded" in caplog.text
    model = await server.model()
    assert not model.HasField("repair")
    assert [level.stand_in for level in model.levels] == [NONE] * 3
    assert server.value("fathom_repair_up") == 0
    policy = server.service.policy
    assert policy.selection(fast).repair is None
    without, repaired = policy.qualities[fast].kl_nats, before.qualities[fast].kl_nats
    assert without is not None
    assert repaired == pytest.approx(without / 2), "those that were measured without repair"
    error = await failure(
        server.client.control.SetLevels(
            control_pb2.SetLevelsRequest(
                levels=[control_pb2.LevelSpec(name="one", depth=common_pb2.Depth(layers=1))]
            )
        )
    )
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert message_of(error) == "a fit of repair is running"

    server.engine.fit_gate.set()
    await server.until_in_force(CLOSED_FORM)
    assert server.engine.num_fits == 2
    await until(lambda: not server.service.status().unmeasured)
    assert server.service.policy == before
    assert (await server.status()).repair_problem == ""
    assert server.value("fathom_repair_up") == 1
    answer = await server.client.inference.Generate(request(level="fast"))
    assert answer.served.stand_in == CLOSED_FORM


async def test_an_engine_that_dies_while_repair_is_fitted_again(server: Repaired) -> None:
    server.maps.unlink()
    server.engine.fit_gate.clear()
    server.engine.die()
    await server.until_in_force(NONE)
    server.engine.die()
    while server.engine.num_starts < 3:
        await asyncio.sleep(0.01)
    server.engine.fit_gate.set()
    await server.until_in_force(CLOSED_FORM)


async def test_repair_that_cannot_be_fitted_again(server: Repaired) -> None:
    server.maps.unlink()
    server.maps.mkdir()
    server.engine.die()
    while not (await server.status()).repair_problem.startswith("repair is not used"):
        await asyncio.sleep(0.01)
    assert (await server.status()).repair_in_force == NONE
    answer = await server.client.inference.Generate(request(level="fast"))
    assert answer.served.stand_in == NONE
    # The next engine is another chance.
    server.maps.rmdir()
    server.engine.die()
    await server.until_in_force(CLOSED_FORM)


async def test_maps_that_are_sound_stay_in_force(server: Repaired) -> None:
    policy = server.service.policy
    server.engine.die()
    while server.service.status().num_engine_restarts < 1:
        await asyncio.sleep(0.01)
    answer = await server.client.inference.Generate(request(level="fast"))
    assert answer.served.stand_in == CLOSED_FORM
    assert server.service.policy == policy
    assert server.engine.num_fits == 1
