"""Fathom over gRPC."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from bench.subjects.base import EngineSettings, free_port
from bench.subjects.server_process import ServerProcess
from bench.workload import Request
from server.cli.connection import Connection, connected
from server.rpc.client import AsyncClient, CallError, Client, token_metadata
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

# Two windows of text, the least that a standard error needs.
_QUALITY_TOKENS = 1024


class FathomServer:
    """A ``fathom serve`` process that is started here, or a server that is already running."""

    name = "Fathom, gRPC"

    def __init__(
        self,
        settings: EngineSettings | None,
        connection: Connection | None = None,
        *,
        http_port: int | None = None,
    ) -> None:
        """``settings`` are those of a server to start; None if there is a ``connection``.

        With ``http_port`` the server that is started answers OpenAI's API there, too.
        """
        self._settings = settings
        self._http_port = http_port
        self._process: ServerProcess | None = None
        self._client: AsyncClient | None = None
        self._connection = connection or Connection("")
        self._metadata = token_metadata(self._connection.token)

    @property
    def address(self) -> str:
        return self._connection.address

    async def start(self) -> None:
        if self._settings is not None:
            port = free_port()
            self._connection = Connection(f"127.0.0.1:{port}")
            log = self._settings.model.work_dir / "logs" / f"fathom-{port}.log"
            command = serve_command(self._settings, port, self._settings.model.work_dir / "state")
            if self._http_port is not None:
                command += ["--http-port", self._http_port]
            self._process = ServerProcess(command, log)
            await self._process.wait_until(lambda: is_serving(self.address))
        self._client = AsyncClient(self.address, tls=self._connection.tls)

    def model(self) -> inference_pb2.Model:
        """Raises :class:`CallError`."""
        with connected(self._connection) as client:
            return client.get_model()

    async def generate(self, request: Request) -> AsyncIterator[int]:
        assert self._client is not None
        message = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=request.prompt_ids),
            depth=None if request.depth is None else common_pb2.Depth(layers=request.depth),
            sampling=inference_pb2.SamplingParams(temperature=0.0),
            stop=inference_pb2.StopConditions(max_tokens=request.num_tokens, ignore_eos=True),
            output=inference_pb2.OutputOptions(token_ids=True),
        )
        stream = self._client.inference.GenerateStream(message, metadata=self._metadata)
        async for response in stream:
            if response.WhichOneof("event") == "delta":
                yield len(response.delta.token_ids)

    def processes(self) -> list[psutil.Process]:
        return [] if self._process is None else self._process.processes()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            self._process.close()


def serve_command(settings: EngineSettings, port: int, state_dir: Path) -> list[object]:
    """Return the command of a server that measures as little as possible when it starts."""
    model = settings.model
    compiling = settings.compile_layers
    return [
        *(Path(sys.executable).parent / "fathom", "serve", "--model", model.directory),
        *("--port", port, "--metrics-port", free_port(), "--state-dir", state_dir),
        *("--dtype", settings.dtype, "--max-context", settings.max_context),
        *("--max-num-seqs", settings.max_num_seqs, "--plan", model.plan_file),
        *("--levels", f"dense={model.num_layers}", "--quality-tokens", _QUALITY_TOKENS),
        *("--quality-depths", "levels", "--startup-seconds", "inf"),
        *("--engine-args", json.dumps(settings.fathom_engine_args())),
        *([] if compiling is None else ["--compile-layers", str(compiling).lower()]),
    ]


async def is_serving(address: str) -> bool:
    """Return whether a server answers at ``address`` that it serves."""
    try:
        with Client(address, timeout=5.0) as client:
            return client.health() == "SERVING"
    except CallError:
        return False
