"""A real HTTP server on a real port, with a toy engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from pruning.quality import Quality
from server.access.authenticator import Authenticator
from server.access.clients import load_clients
from server.calls.call_record import CallRecord
from server.depth.measured import Measured, Speed
from server.depth.policy import DepthPolicy
from server.engine.arguments import (
    EngineConfig,
    base_arguments,
    cpu_arguments,
    prepare_environment,
)
from server.model.source import DEMO_MODEL
from server.openai.server import HttpServer
from server.openai.tls import HttpTls
from server.serving.service import Service
from server.telemetry.metrics import Metrics
from tests.server.rpc.conftest import LEVELS, Deployment
from tests.server.rpc.toy_engine import ToyEngine


@pytest.fixture(scope="session")
def vllm_config() -> Any:
    """The configuration of a model, of which no engine is started."""
    prepare_environment()
    from vllm import AsyncEngineArgs

    config = EngineConfig(model=DEMO_MODEL, name="toy", dtype="float32", kv_cache_gib=0.25)
    arguments = base_arguments(config) | cpu_arguments(config, quantized=False)
    return AsyncEngineArgs(**arguments).create_engine_config()


class ToyVllm(ToyEngine):
    """A toy engine with the configuration of a real one."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__()
        self.vllm_config = vllm_config


class NoRpc:
    """Stands where the deployments of gRPC have its server."""

    port = 1


@dataclass
class HttpDeployment(Deployment):
    """Everything of one server, and clients."""

    http: HttpServer = field(kw_only=True)
    records: list[CallRecord] = field(default_factory=list, kw_only=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    async def open(self) -> None:
        assert isinstance(self.engine, ToyVllm)
        await self.http.open(self.engine, self.engine.model.name)
        await super().open()

    def policy(self) -> DepthPolicy:
        qualities = {
            level.depths: Quality(10.0 + 8 - level.decode_layers, 0.5, 0.9, 0.1, 100)
            for level in LEVELS
        }
        speeds = {level.depths: Speed(100.0, 1.0, 8) for level in LEVELS}
        return super().policy().with_measured(Measured(qualities, speeds))

    def openai(self, key: str = "none", **options: Any) -> AsyncOpenAI:
        """Return the real client; it does not try again."""
        options = {"max_retries": 0, "base_url": f"{self.url}/v1", "api_key": key, **options}
        return AsyncOpenAI(**options)

    def raw(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(**{"base_url": self.url, "timeout": 60, **options})

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        async with self.raw() as client:
            return await client.post(path, json=body, **options)


@asynccontextmanager
async def http_deployment(
    vllm_config: Any,
    *,
    service: dict[str, Any] | None = None,
    clients: Any = None,
    tls: HttpTls | None = None,
    **options: Any,
) -> AsyncIterator[HttpDeployment]:
    """Yield a server that is still starting; ``service`` and ``options`` are those of its parts."""
    async with AsyncExitStack() as stack:
        engine, metrics = ToyVllm(vllm_config), Metrics()
        served = Service(
            engine,
            metrics,
            version="1.2.3",
            first_restart_delay=0.01,
            poll_seconds=0.05,
            **(service or {}),
        )
        stack.push_async_callback(served.close)
        records: list[CallRecord] = []
        http = HttpServer(
            served,
            "127.0.0.1",
            0,
            **{
                "authenticator": Authenticator(None if clients is None else load_clients(clients)),
                "observers": [records.append],
                "only_loopback": True,
                "max_body_bytes": 2**20,
                "tls": tls,
                **options,
            },
        )
        await http.start()
        stack.push_async_callback(http.stop)
        rpc: Any = NoRpc()
        deployment = HttpDeployment(engine, metrics, served, rpc, [], http=http, records=records)
        stack.push_async_callback(deployment.close)
        yield deployment


@pytest.fixture
async def starting(
    vllm_config: Any, request: pytest.FixtureRequest
) -> AsyncIterator[HttpDeployment]:
    """A server that listens, but is still starting; an indirect parameter sets options."""
    async with http_deployment(vllm_config, **getattr(request, "param", {})) as deployment:
        yield deployment


@pytest.fixture
async def deployment(starting: HttpDeployment) -> HttpDeployment:
    """A server that serves."""
    await starting.open()
    return starting


async def until_recorded(deployment: HttpDeployment, number: int = 1) -> CallRecord:
    """Return the last of ``number`` records, once there are as many."""
    while len(deployment.records) < number:
        await asyncio.sleep(0.01)
    return deployment.records[number - 1]
