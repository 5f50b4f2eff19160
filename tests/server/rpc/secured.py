"""A gRPC server with TLS and clients, with a toy engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.rpc.access import Access, AccessFiles
from server.rpc.client import Client
from server.rpc.client_tls import ClientTls
from server.rpc.interceptors import Observer
from server.rpc.server import RpcServer
from server.serving.service import Service
from server.telemetry.metrics import Metrics
from tests.server.rpc.conftest import Deployment
from tests.server.rpc.toy_engine import ToyEngine

T = TypeVar("T")


@dataclass(kw_only=True)
class Secured(Deployment):
    """A deployment whose files are watched."""

    access: Access

    async def use(
        self,
        function: Callable[[Client], T],
        *,
        tls: ClientTls | None = None,
        token: str | None = None,
    ) -> T:
        """Run a function with a client that waits, off the event loop of the server."""

        def run() -> T:
            with Client(self.address, timeout=30, tls=tls, token=token) as client:
                return function(client)

        return await asyncio.to_thread(run)


@asynccontextmanager
async def secured(
    files: AccessFiles,
    *,
    observers: tuple[Observer, ...] = (),
    service: Mapping[str, Any] | None = None,
    anonymous_control: bool = True,
    **options: int,
) -> AsyncIterator[Secured]:
    """Yield a server that serves; ``service`` and ``options`` are those of its parts."""
    async with AsyncExitStack() as stack:
        engine, metrics = ToyEngine(), Metrics()
        served = Service(engine, metrics, **(service or {}))
        stack.push_async_callback(served.close)
        access = Access(files, metrics, anonymous_control=anonymous_control)
        rpc = RpcServer(
            served,
            "127.0.0.1",
            0,
            tls=access.tls,
            authenticator=access.authenticator,
            observers=observers,
            **options,
        )
        await rpc.start()
        stack.push_async_callback(rpc.stop)
        following = asyncio.create_task(access.follow(seconds=0.01))
        stack.callback(following.cancel)
        deployment = Secured(engine, metrics, served, rpc, [], access=access)
        stack.push_async_callback(deployment.close)
        await deployment.open()
        yield deployment
