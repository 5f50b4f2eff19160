"""vLLM's own server."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil

from bench.subjects.base import EngineSettings, free_port, own_choice_of_runner
from bench.subjects.server_process import ServerProcess
from bench.workload import Request

_NAME = "bench"


class OpenAiServer:
    """vLLM's OpenAI server on the dense checkpoint; streams over HTTP."""

    name = "vLLM, HTTP"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._process: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._url = ""

    async def start(self) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
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
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())
        await self._process.wait_until(self._serves)

    async def _serves(self) -> bool:
        assert self._session is not None
        try:
            async with self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def generate(self, request: Request) -> AsyncIterator[int]:
        assert self._session is not None
        body = {
            "model": _NAME,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            # A chunk may have no text or several tokens; ``usage`` counts the tokens so far.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        num_tokens = 0
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    usage: dict[str, Any] = json.loads(line[6:])["usage"]
                    before, num_tokens = num_tokens, usage["completion_tokens"]
                    yield num_tokens - before

    def processes(self) -> list[psutil.Process]:
        return [] if self._process is None else self._process.processes()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            self._process.close()
