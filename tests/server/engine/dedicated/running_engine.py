"""Real dedicated engines for tests that are not asynchronous themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pruning.plan import Plan
from server.engine.base import GenerationRequest, LayerSelection, SamplingOptions
from server.engine.dedicated.engine import DedicatedConfig, DedicatedEngine
from server.engine.ranks import ONE_PROCESS, Ranks

T = TypeVar("T")

NUM_TOKENS = 40


class RunningEngines:
    """The engine and the event loop that it runs in."""

    def __init__(self, model: Path, state: Path, plan: Plan, ranks: Ranks = ONE_PROCESS) -> None:
        self.loop = asyncio.new_event_loop()
        self.plan = plan
        self.restarts = 0
        self.engine = DedicatedEngine(
            DedicatedConfig(
                model=model,
                name="stories",
                dtype="float32",
                max_num_seqs=64,
                kv_cache_gib=0.25,
                engine_args={"enforce_eager": True},
                state_dir=state,
                ranks=ranks,
                timeout_seconds=60.0,
            )
        )
        self.engine.on_restart = self.count
        self._others = _engine_processes()
        self.run(self.engine.start())

    def count(self) -> None:
        self.restarts += 1

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def prepare(self, levels: dict[str, LayerSelection]) -> None:
        self.run(self.engine.prepare(self.plan, levels, lambda *_: None))

    async def tokens(self, name: str, prompt: Sequence[int], layers: LayerSelection) -> list[int]:
        options = SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = GenerationRequest(name, prompt, layers, options)
        return [i async for delta in self.engine.generate(request) for i in delta.token_ids]

    def close(self) -> None:
        self.run(self.engine.shutdown())
        left = self.processes()
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()
        assert left == set()

    def generate(self, prompts: list[list[int]], layers: LayerSelection) -> list[list[int]]:
        async def everything() -> list[list[int]]:
            names = (f"{len(layers.decode_skips)}-{n}" for n in range(len(prompts)))
            tasks = [self.tokens(*pair, layers) for pair in zip(names, prompts, strict=True)]
            return list(await asyncio.gather(*tasks))

        return self.run(everything())

    def processes(self) -> set[int]:
        """Return the engines' processes, without those that have ended."""
        return _engine_processes() - self._others


def _engine_processes() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # also for a zombie
            if "EngineCore" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found
