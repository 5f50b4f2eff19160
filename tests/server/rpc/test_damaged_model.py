"""A real engine with damaged weights behind a plan that was kept: nothing measures it any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from pruning.plan import Plan
from server.calibration.calibrator import Calibrator
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.rpc.server import INFERENCE, RpcServer
from server.serving.service import Service
from server.telemetry.metrics import Metrics
from tests.server.engine.elastic.damaged_model import damaged_model
from tests.server.rpc.conftest import failure, message_of

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Depth 4 skips the damaged layer.
PLAN = Plan(
    removal_order=(2, 1, 3, 0, 4),
    scores=(0.3, 0.2, 0.1, 0.25, 0.4),
    stderrs=(0.01,) * 5,
    model_fingerprint="sha256:model",
    text_fingerprint="sha256:text",
    num_tokens=1000,
    versions={},
    created_at=1.7e9,
)
LEVELS = (Level("dense", 5, 5), Level("sound", 4, 4))
PROBLEM = "at depth 5 the model computes values that are not finite numbers: its weights are "


class Damaged:
    """A server of the damaged model, and a client."""

    def __init__(self, service: Service, client: AsyncClient) -> None:
        self.service = service
        self.client = client

    async def next_health(self, watch: object) -> int:
        return int((await watch.read()).status)  # type: ignore[attr-defined]

    async def problems(self) -> list[str]:
        status = await self.client.control.GetStatus(control_pb2.GetStatusRequest())
        return list(status.problems)

    async def generate(self, depth: int) -> inference_pb2.GenerateResponse:
        response: inference_pb2.GenerateResponse = await self.client.inference.Generate(
            inference_pb2.GenerateRequest(
                prompt="Once upon a time",
                depth=common_pb2.Depth(layers=depth),
                stop=inference_pb2.StopConditions(max_tokens=4),
            )
        )
        return response

    def count(self, depth: int) -> float | None:
        registry = self.service.metrics.registry
        return registry.get_sample_value("fathom_non_finite_results_total", {"depth": str(depth)})


@pytest.fixture
async def damaged(stories_model: Path, tmp_path: Path) -> AsyncIterator[Damaged]:
    directory = damaged_model(stories_model, tmp_path / "damaged")
    async with AsyncExitStack() as stack:
        engine = ElasticEngine(
            ElasticConfig(
                model=directory,
                name="damaged",
                dtype="float32",
                kv_cache_gib=0.25,
                max_num_seqs=16,
                compile_layers=False,
            )
        )
        stack.push_async_callback(engine.shutdown)
        await engine.start()
        service = Service(engine, Metrics(), checks_results=True)
        stack.push_async_callback(service.close)
        rpc = RpcServer(service, "127.0.0.1", 0)
        await rpc.start()
        stack.push_async_callback(rpc.stop)
        client = AsyncClient(f"127.0.0.1:{rpc.port}")
        stack.push_async_callback(client.close)
        calibrator = Calibrator(
            engine,
            model_fingerprint="sha256:model",
            versions={},
            texts=["Once upon a time there was a girl. " * 20],
            max_tokens=100,
            held_out_texts=["One day a boy went to the park. " * 20],
            max_held_out_tokens=100,
            every_depth=False,
        )
        service.open(DepthPolicy(PLAN, LEVELS, default_level="sound"), calibrator)
        yield Damaged(service, client)


async def test_health_status_metrics_and_log_tell_of_damaged_weights(
    damaged: Damaged, caplog: pytest.LogCaptureFixture
) -> None:
    service, client = damaged.service, damaged.client
    watch = client.health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert await damaged.next_health(watch) == SERVING
    while not (problems := await damaged.problems()):
        pass
    assert [problem.startswith(PROBLEM) for problem in problems] == [True]
    assert f"a prompt of the server's own shows that {problems[0]}" in caplog.messages

    for _ in range(2):
        error = await failure(damaged.generate(5))
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert message_of(error) == problems[0]
    assert (await damaged.generate(4)).text
    assert (damaged.count(5), damaged.count(4)) == (2, 0)
    logged = [text for text in caplog.messages if "further ones at this depth" in text]
    assert len(logged) == 1
    assert "of client 127.0.0.1: at depth 5 " in logged[0]
    # What requests get that name no depth is sound.
    assert service.is_healthy

    # Another default level that is not: neither a request nor a client has said so.
    service._in_force.install(DepthPolicy(PLAN, LEVELS, default_level="dense"))
    assert await damaged.next_health(watch) == NOT_SERVING
    assert (await damaged.generate(4)).text
    service._in_force.install(DepthPolicy(PLAN, LEVELS, default_level="sound"))
    assert await damaged.next_health(watch) == SERVING

    # What is measured while serving is refused, and changes nothing.
    level = control_pb2.LevelSpec(name="deep", depth=common_pb2.Depth(layers=5))
    error = await failure(client.control.SetLevels(control_pb2.SetLevelsRequest(levels=[level])))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert message_of(error) == problems[0]
    assert [each.name for each in service.policy.levels] == ["dense", "sound"]
