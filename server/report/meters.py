"""The model of a report as it is loaded: by the engine, by transformers, or by both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from pruning.weights import weight_bytes
from server.calibration.offline_plan import load_offline
from server.config import Settings
from server.model.inputs import refused_as
from server.model.source import ModelSource
from server.report.engine_meter import EngineMeter
from server.report.not_possible import NotPossible
from server.report.subject import Subject
from server.report.transformers_meter import TransformersMeter
from server.telemetry.progress import ProgressReport


class Meters:
    """Loads a model when something is first measured on it, and not twice where memory is short."""

    def __init__(
        self,
        settings: Settings,
        subject: Subject,
        progress: ProgressReport,
        check_time: Callable[[], None],
    ) -> None:
        """``check_time`` raises if there is no time left to load a model for."""
        self._settings = settings
        self._subject = subject
        self._progress = progress
        self._check_time = check_time
        self._engine: EngineMeter | None = None
        self._transformers: TransformersMeter | None = None

    async def close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    async def engine(self) -> EngineMeter:
        """Return the model in the engine; raises :class:`StartError` if it cannot be started."""
        if self._engine is None:
            if not self._fits_twice():
                self._transformers = None
            self._engine = await self._started(EngineMeter(self._settings, self._subject))
        return self._engine

    async def transformers(self) -> TransformersMeter:
        """Return the model as transformers loads it; raises :class:`NotPossible` if it cannot."""
        if self._transformers is None:
            self._check_time()
            if not self._fits_twice():
                await self.close_engine()
            with self._progress.working("Loading the model with transformers"):
                try:
                    model, _ = load_offline(self._settings, self._subject.directory)
                except Exception as error:  # transformers has no base class
                    raise NotPossible(f"transformers cannot load the model: {error}") from error
            self._transformers = TransformersMeter(model)
        return self._transformers

    @asynccontextmanager
    async def engine_of(self, checkpoint: Path) -> AsyncIterator[EngineMeter]:
        """Run another checkpoint of the model in an engine, alone."""
        await self.close_engine()
        source = ModelSource(checkpoint, self._subject.source.name)
        settings = self._settings.model_copy(update={"dtype": "auto"})
        meter = await self._started(EngineMeter(settings, replace(self._subject, source=source)))
        try:
            yield meter
        finally:
            await meter.close()

    async def _started(self, meter: EngineMeter) -> EngineMeter:
        with (
            self._progress.working("Starting the engine"),
            refused_as("engine", Exception),  # vLLM documents no base class of what it raises
        ):
            await meter.start()
        return meter

    def _fits_twice(self) -> bool:
        """Return whether the engine and transformers can have the model in memory together."""
        import torch

        needed = 2 * weight_bytes(self._subject.directory)
        return not torch.cuda.is_available() and psutil.virtual_memory().available > 2 * needed
