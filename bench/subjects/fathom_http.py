"""Fathom over HTTP, by the server that also answers gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator

import psutil

from bench.subjects.fathom_server import FathomServer
from bench.subjects.openai_client import OpenAiClient
from bench.workload import Request


class FathomHttp:
    """OpenAI's API of a server that is started and closed as a :class:`FathomServer`."""

    name = "Fathom, HTTP"

    def __init__(self, server: FathomServer, http_port: int) -> None:
        self._server = server
        self._http_port = http_port
        self._client: OpenAiClient | None = None
        self._model = ""

    async def start(self) -> None:
        """Return at once: the server must have been started."""
        self._client = OpenAiClient(f"http://127.0.0.1:{self._http_port}")
        self._model = self._server.model().name

    async def generate(self, request: Request) -> AsyncIterator[int]:
        assert self._client is not None
        depth = "" if request.depth is None else f"@{request.depth}"
        async for num_tokens in self._client.generate(self._model + depth, request):
            yield num_tokens

    def processes(self) -> list[psutil.Process]:
        return self._server.processes()

    async def close(self) -> None:
        """End the client; the server goes on."""
        if self._client is not None:
            await self._client.close()
