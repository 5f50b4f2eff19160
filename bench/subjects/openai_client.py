"""A client of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from bench.workload import Request


class OpenAiClient:
    """Streams completions of the server at ``url``, without a limit on connections or time."""

    def __init__(self, url: str) -> None:
        self._url = url
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout())

    async def is_serving(self) -> bool:
        try:
            async with self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def generate(self, model: str, request: Request) -> AsyncIterator[int]:
        """Yield the number of tokens in each event, as it comes; ``model`` says the depth."""
        body = {
            "model": model,
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

    async def close(self) -> None:
        await self._session.close()
