"""Measurements in the elastic engine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruning.metrics import DensePass, dense_pass
from pruning.quality import Quality
from server.calibration.speed_meter import count_tokens, tokens_per_second
from server.config import Settings
from server.engine.base import LayerSelection, ProgressCallback
from server.engine.elastic.engine import ElasticEngine
from server.model.engine_config import elastic_config
from server.report.subject import Subject

_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a selection of layers runs.

    ``first_token_seconds`` is from a request for ``prompt_tokens`` to its first token, with
    nothing else running; ``tokens_per_second`` those generated in all of ``num_streams`` at a time.
    """

    first_token_seconds: float
    tokens_per_second: float
    prompt_tokens: int
    num_streams: int


class EngineMeter:
    """One elastic engine, for as long as it is measured with."""

    def __init__(self, settings: Settings, subject: Subject) -> None:
        self._engine = ElasticEngine(
            elastic_config(settings, subject.directory, subject.source.name)
        )

    @property
    def engine(self) -> ElasticEngine:
        return self._engine

    async def start(self) -> None:
        """Load the model; raises what :meth:`ElasticEngine.start` does."""
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.shutdown()

    async def dense_pass(
        self, windows: Sequence[Sequence[int]], progress: ProgressCallback
    ) -> DensePass:
        return dense_pass(await self._engine.measure_importance(windows, progress))

    async def qualities(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        return await self._engine.measure_quality(windows, selections, progress)

    async def install(self, maps: Path, fingerprint: str) -> None:
        """Have the maps in the file stand in for the layers that a selection skips."""
        if not self._engine.has_repair(fingerprint):
            await self._engine.install_repair(maps)

    async def paces(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Pace]:
        """Generate ``num_tokens`` from the first prompt alone, then from all of them at a time.

        The selections take turns, so that a change of the machine's pace hits all of them, and
        the best of three rounds counts: whatever else ran only slowed the others.
        """
        first_tokens = [math.inf] * len(selections)
        rates = [0.0] * len(selections)
        for round_ in range(_ROUNDS):
            for i, layers in enumerate(selections):
                first_token = await self._first_token(prompts[0], layers)
                first_tokens[i] = min(first_tokens[i], first_token)
                rate = await tokens_per_second(self._engine, prompts, num_tokens, layers)
                rates[i] = max(rates[i], rate)
                progress(round_ * len(selections) + i + 1, _ROUNDS * len(selections))
        return [
            Pace(first_token, rate, len(prompts[0]), len(prompts))
            for first_token, rate in zip(first_tokens, rates, strict=True)
        ]

    async def _first_token(self, prompt: Sequence[int], layers: LayerSelection) -> float:
        started = time.perf_counter()
        await count_tokens(self._engine, prompt, 1, layers)
        return time.perf_counter() - started
