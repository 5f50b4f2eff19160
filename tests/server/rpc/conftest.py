"""A real gRPC server on a real port, with a toy engine behind it."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pruning.plan import Plan
from server.calibration.calibrator import Calibrator
from server.calibration.policy_store import PolicyStore
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import inference_pb2, inference_pb2_grpc
from server.rpc.server import RpcServer
from server.serving.service import Service
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_server import MetricsServer
from tests.server.rpc.credentials import CLIENTS, Deployed, written
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine

REMOVAL_ORDER = (5, 4, 3, 6, 2, 1, 7, 0)
LEVELS = (Level("dense", 8, 8), Level("fast", 4, 4), Level("generative", 4, 8))


def make_plan() -> Plan:
    return Plan(
        removal_order=REMOVAL_ORDER,
        scores=(0.9, 0.6, 0.5, 0.3, 0.2, 0.1, 0.4, 0.8),
        stderrs=(0.01,) * NUM_LAYERS,
        model_fingerprint="sha256:model",
        text_fingerprint="sha256:text",
        num_tokens=1000,
        versions={"toy": "1"},
        created_at=1.7e9,
    )


class RecordingStore(PolicyStore):
    """Remembers the policies that it is to keep."""

    def __init__(self, saved: list[DepthPolicy]) -> None:
        self._saved = saved

    def save(self, policy: DepthPolicy) -> None:
        self._saved.append(policy)


@dataclass
class Deployment:
    """Everything of one server, and a client."""

    engine: ToyEngine
    metrics: Metrics
    service: Service
    rpc: RpcServer
    saved: list[DepthPolicy] = field(default_factory=list)
    # Too little for probes.
    held_out: str = "held-out text " * 20
    max_held_out_tokens: int = 200
    client: AsyncClient = field(init=False)
    metrics_server: MetricsServer | None = None

    def __post_init__(self) -> None:
        self.client = AsyncClient(self.address)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.rpc.port}"

    async def open(self) -> None:
        """Start the engine and begin to serve."""
        with self.service.phase("engine"):
            await self.engine.start()
        calibrator = Calibrator(
            self.engine,
            model_fingerprint="sha256:model",
            versions={"toy": "1"},
            texts=["calibration text " * 20],
            max_tokens=200,
            held_out_texts=[self.held_out],
            max_held_out_tokens=self.max_held_out_tokens,
            every_depth=True,
        )
        store = RecordingStore(self.saved)
        self.service.open(self.policy(), calibrator, store)

    def policy(self) -> DepthPolicy:
        """Return the policy that is served at first."""
        return DepthPolicy(make_plan(), LEVELS)

    async def close(self) -> None:
        await self.client.close()
        if self.metrics_server is not None:
            self.metrics_server.close()

    async def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Read the metrics over HTTP, by name and labels."""
        if self.metrics_server is None:
            self.metrics_server = MetricsServer(self.metrics, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{self.metrics_server.port}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=30) as response:
                return str(response.read().decode())

        text = await asyncio.to_thread(read)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def metric(self, name: str, **labels: str) -> float | None:
        return (await self.scrape()).get((name, frozenset(labels.items())))


@pytest.fixture
async def starting(request: pytest.FixtureRequest) -> AsyncIterator[Deployment]:
    """A server that listens, but is still starting; an indirect parameter sets options."""
    options = getattr(request, "param", {})
    async with AsyncExitStack() as stack:
        engine, metrics = ToyEngine(), Metrics()
        service = Service(
            engine,
            metrics,
            version="1.2.3",
            first_restart_delay=0.01,
            poll_seconds=0.05,
            **options,
        )
        stack.push_async_callback(service.close)
        rpc = RpcServer(service, "127.0.0.1", 0, max_message_bytes=2**20)
        await rpc.start()
        stack.push_async_callback(rpc.stop)
        deployment = Deployment(engine, metrics, service, rpc)
        stack.push_async_callback(deployment.close)
        yield deployment


@pytest.fixture
async def deployment(starting: Deployment) -> Deployment:
    """A server that serves."""
    await starting.open()
    return starting


@pytest.fixture
async def narrow_stub(deployment: Deployment) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    """A client whose connection holds little that has not been read, so that the server waits."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(deployment.address, options=options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def clients_file(tmp_path: Path) -> Path:
    return written(tmp_path / "clients", CLIENTS)


@pytest.fixture
def deployed(tmp_path: Path) -> Deployed:
    return Deployed(tmp_path)


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """Return the error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def message_of(error: grpc.aio.AioRpcError) -> str:
    """Return the message, which must speak of nothing but the request."""
    message = error.details() or ""
    assert not re.search(r"Traceback|\.py\b|object at 0x", message)
    return message


async def collect(call: object) -> list[inference_pb2.GenerateStreamResponse]:
    return [message async for message in call]  # type: ignore[attr-defined]
