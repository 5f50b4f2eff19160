"""Fathom's engine without its server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import psutil

from bench.subjects.base import EngineSettings, child_ids, new_children
from bench.workload import Request
from server.engine.base import GenerationRequest, SamplingOptions
from server.engine.elastic.engine import ElasticEngine


class ElasticInProcess:
    """The elastic engine with its front in this process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.name = "Fathom, in process"
        if settings.compile_layers is False:
            self.name += ", uncompiled"
        self._model = settings.model
        self.engine = ElasticEngine(settings.elastic_config())
        self._numbers = itertools.count()
        self._processes: list[psutil.Process] = []

    async def start(self) -> None:
        before = child_ids()
        await self.engine.start()
        self._processes = new_children(before)

    async def generate(self, request: Request) -> AsyncIterator[int]:
        generation = GenerationRequest(
            request_id=f"bench-{next(self._numbers)}",
            prompt_ids=request.prompt_ids,
            layers=self._model.selection(request.depth),
            sampling=SamplingOptions(
                temperature=0.0, max_tokens=request.num_tokens, ignore_eos=True
            ),
        )
        async for delta in self.engine.generate(generation):
            yield len(delta.token_ids)

    def processes(self) -> list[psutil.Process]:
        return self._processes

    async def close(self) -> None:
        await self.engine.shutdown()
