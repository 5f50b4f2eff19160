"""vLLM's own server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import psutil

from bench.subjects.base import EngineSettings, free_port, own_choice_of_runner
from bench.subjects.openai_client import OpenAiClient
from bench.subjects.server_process import ServerProcess
from bench.workload import Request

_NAME = "bench"


class OpenAiServer:
    """vLLM's OpenAI server on the dense checkpoint; streams over HTTP."""

    name = "vLLM, HTTP"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._process: ServerProcess | None = None
        self._client: OpenAiClient | None = None

    async def start(self) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        settings = self._settings
        arguments = settings.vllm_arguments()
        command: list[object] = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", settings.model.directory, "--served-model-name", _NAME),
            *("--host", "127.0.0.1", "--port", port, "--no-enable-prefix-caching"),
            *("--disable-uvicorn-access-log", "--disable-log-stats"),
        ]
        for name, value in arguments.items():
            if not isinstance(value, bool):
                command += [f"--{name.replace('_', '-')}", value]
        log = settings.model.work_dir / "logs" / f"openai-{port}.log"
        with own_choice_of_runner():
            self._process = ServerProcess(command, log)
        self._client = OpenAiClient(url)
        await self._process.wait_until(self._client.is_serving)

    async def generate(self, request: Request) -> AsyncIterator[int]:
        assert self._client is not None
        async for num_tokens in self._client.generate(_NAME, request):
            yield num_tokens

    def processes(self) -> list[psutil.Process]:
        return [] if self._process is None else self._process.processes()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._process is not None:
            self._process.close()
