"""A real engine for tests that are not asynchronous themselves."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from server.engine.base import CacheNamespace, GenerationRequest, LayerSelection, SamplingOptions
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig

T = TypeVar("T")

# vLLM does not start where less of a GPU is free, whatever the size of the KV cache.
GPU_MEMORY_SHARE = 0.05

# The namespace of all requests that tests make as one client.
NAMESPACE = CacheNamespace("client", "tests")


class RunningEngine:
    """An engine and the event loop that it runs in."""

    def __init__(self, config: ElasticConfig) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = ElasticEngine(config)
        self._numbers = itertools.count()
        self.run(self.engine.start())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def close(self) -> None:
        self.run(self.engine.shutdown())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        num_tokens: int,
        **sampling: Any,
    ) -> list[list[int]]:
        """Return greedy tokens for all of ``prompts`` at once, in one batch as far as they fit."""
        options = replace(
            SamplingOptions(temperature=0.0, max_tokens=num_tokens, ignore_eos=True), **sampling
        )

        async def one(prompt: Sequence[int], layers: LayerSelection) -> list[int]:
            name = f"test-{next(self._numbers)}"
            request = GenerationRequest(name, prompt, layers, options, NAMESPACE)
            return [i async for delta in self.engine.generate(request) for i in delta.token_ids]

        async def everything() -> list[list[int]]:
            pairs = zip(prompts, selections, strict=True)
            return list(await asyncio.gather(*[one(*pair) for pair in pairs]))

        return self.run(everything())


@contextmanager
def running_engine(model: Path, **settings: Any) -> Iterator[RunningEngine]:
    """Yield an engine; it runs the layers uncompiled, which saves seconds at its start.

    On a GPU other programs may use what it leaves.
    """
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_gib": 0.25,
        "max_num_seqs": 64,
        "compile_layers": False,
    } | settings
    if torch.cuda.is_available():
        given = chosen.get("engine_args", {})
        chosen["engine_args"] = {"gpu_memory_utilization": GPU_MEMORY_SHARE, **given}
    engine = RunningEngine(ElasticConfig(model=model, name=model.name, **chosen))
    try:
        yield engine
    finally:
        engine.close()
