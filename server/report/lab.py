"""What the sections of a report measure with: each measurement is made once, and kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pruning.depths import skipped_layers
from pruning.fingerprint import text_fingerprint
from pruning.importance import BlockInfluence, ImportanceError
from pruning.metrics import METRICS, DensePass, Evidence, Ranking
from pruning.metrics.base import Need
from pruning.quality import Quality, QualityError
from pruning.repair import RepairError, load_maps, maps_fingerprint
from server.calibration.hardware import describe_hardware
from server.calibration.layer_search import LayerSearch, search_text_tokens
from server.calibration.search_store import SearchStore
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition
from server.evaluation.multiple_choice import Accuracy, Question, accuracy
from server.model.inputs import refused_as
from server.report.budget import Budget, BudgetSpent
from server.report.engine_meter import EngineMeter, Pace
from server.report.meters import Meters
from server.report.not_possible import NotPossible
from server.report.options import ReportOptions
from server.report.output import ReportDirectory
from server.report.subject import Subject
from server.report.transformers_meter import TransformersMeter
from server.report.windows import Windows
from server.state import JsonEntry
from server.state_keys import Measuring
from server.telemetry.progress import ProgressReport

_METHOD = 1
_SEARCH_WINDOW = 256
# Each group runs the dense model as well; after each one what was measured is kept.
_SELECTIONS_AT_A_TIME = 6
_GENERATED = 24

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """One line of the qualities that are kept."""

    layers: LayerSelection
    quality: Quality


class Lab:
    """Measures one model in the engine, or with transformers where the engine does not run it.

    Everything raises :class:`BudgetSpent` where there is no time left for what is not kept,
    :class:`NotPossible` for what cannot be had, and :class:`StartError` where the model cannot be
    measured at all.
    """

    def __init__(
        self,
        settings: Settings,
        options: ReportOptions,
        subject: Subject,
        directory: ReportDirectory,
        progress: ProgressReport,
    ) -> None:
        self.settings = settings
        self.options = options
        self.subject = subject
        self.progress = progress
        self.budget = Budget(options.budget_seconds)
        self.directory = directory
        self._state = directory.state()
        self._windows = Windows(settings, subject)
        self._meters = Meters(settings, subject, progress, self.budget.check)
        self._qualities: dict[LayerSelection, Quality] | None = None

    async def close(self) -> None:
        await self._meters.close_engine()

    @property
    def num_layers(self) -> int:
        return self.subject.num_layers

    @property
    def dense(self) -> LayerSelection:
        return LayerSelection()

    def check_elastic(self) -> None:
        """Raise :class:`NotPossible` for a model that the engine does not run."""
        if self.subject.not_elastic:
            raise NotPossible(f"it needs the elastic engine: {self.subject.not_elastic}")

    async def importance(self) -> BlockInfluence:
        """Return the Block Influence of every layer on the calibration text."""
        return (await self.dense_pass()).block_influence

    async def dense_pass(self) -> DensePass:
        """Return what the metrics that need one pass measure on the calibration text."""

        async def measure() -> DensePass:
            report = self.reporting("Importance")
            with _measuring("calibration"):
                if self.subject.not_elastic:
                    return (await self.transformers()).dense_pass(self.windows, report)
                return await (await self._meters.engine()).dense_pass(self.windows, report)

        return await self.kept("dense-pass", DensePass, self.text_key, measure)

    async def ranking(self, metric: str, repair: str | None = None) -> Ranking:
        """Return the order of ``metric``; a search counts on the maps ``repair``."""
        need = METRICS[metric].need
        evidence = Evidence(self.num_layers)
        if need is Need.LOSSES:
            return await self._searched(metric, repair)
        if need is Need.DENSE_PASS:
            evidence = Evidence(self.num_layers, dense_pass=await self.dense_pass())
        return METRICS[metric].rank(evidence)

    async def selection(
        self, metric: str, depth: int, *, repaired: bool = False, prefill: int | None = None
    ) -> LayerSelection:
        """Return the layers that ``metric`` skips at a depth, or at two of them."""
        repair = await self.repair() if repaired else None
        order = (await self.ranking(metric, repair)).removal_order
        decode = skipped_layers(order, depth)
        of_prompt = decode if prefill is None else skipped_layers(order, prefill)
        if not decode and not of_prompt:
            return self.dense
        return LayerSelection(of_prompt, decode, repair)

    async def _searched(self, metric: str, repair: str | None) -> Ranking:
        self.check_elastic()
        key = {
            **self.text_key,
            "metric": metric,
            "repair": repair or "",
            "search_tokens": self.settings.search_tokens,
        }

        async def search() -> Ranking:
            meter = await self._meters.engine()
            if repair is not None:
                await meter.install(self._maps_path, repair)
            wanted = search_text_tokens(self.num_layers, self.settings.search_tokens)
            num_tokens = min(wanted, self.settings.calibration_tokens)
            windows = self._windows.of_search(num_tokens, _SEARCH_WINDOW)
            store = SearchStore(self._state, Measuring(**self._measuring_key))
            name = f"Search by {metric}{' with repair' if repair else ''}"
            try:
                searching = LayerSearch(
                    meter.engine,
                    windows,
                    max_tokens=self.settings.search_tokens,
                    repair=repair,
                    kept=store.on(windows, repair),
                    progress=self.reporting(name),
                )
            except FailedPrecondition as error:  # too few tokens
                raise NotPossible(str(error)) from None
            with _measuring("calibration"):
                remaining = self.budget.remaining
                try:
                    async with asyncio.timeout(None if remaining == float("inf") else remaining):
                        return await searching.rank(METRICS[metric])
                except TimeoutError:
                    raise BudgetSpent from None

        return await self.kept("ranking", Ranking, key, search)

    @property
    def _maps_path(self) -> Path:
        return self._state.path_of("repair", self.text_key).with_suffix(".safetensors")

    async def repair(self) -> str:
        """Return the fingerprint of maps for all layers, fitted on the calibration text."""
        self.check_elastic()
        path = self._maps_path
        if not self._has_maps(path):
            self.budget.check()
            meter = await self._meters.engine()
            try:
                await meter.engine.fit_repair(
                    self.windows,
                    path,
                    model_fingerprint=self.subject.fingerprint,
                    text_fingerprint=text_fingerprint(self.subject.texts),
                    progress=self.reporting("Fitting repair"),
                )
            except RepairError as error:
                raise NotPossible(f"repair cannot be fitted: {error}") from None
        return maps_fingerprint(path)

    def _has_maps(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            maps = load_maps(path)
            maps.check_model(self.subject.fingerprint, self.num_layers, maps.hidden_size)
        except (RepairError, OSError) as error:
            logger.warning("%s is not used and will be made anew: %s", path, error)
            return False
        return True

    async def qualities(
        self, selections: Sequence[LayerSelection], what: str
    ) -> AsyncIterator[tuple[LayerSelection, Quality]]:
        """Yield the quality of each selection on the held-out text, in their order."""
        wanted = list(dict.fromkeys(selections))
        known = self._known_qualities()
        missing = [layers for layers in wanted if layers not in known]
        total = len(missing)
        for layers in wanted:
            if layers not in known:
                self.budget.check()
                group = missing[:_SELECTIONS_AT_A_TIME]
                done = total - len(missing)
                await self._measure_qualities(group, what, done, total)
                missing = missing[len(group) :]
            yield layers, known[layers]

    async def quality(self, layers: LayerSelection, what: str) -> Quality:
        async for _, quality in self.qualities([layers], what):
            return quality
        raise AssertionError("one was asked for")

    async def _measure_qualities(
        self, group: Sequence[LayerSelection], what: str, num_done: int, total: int
    ) -> None:
        known = self._known_qualities()

        def report(done: int, of: int) -> None:
            share = done / of if of else 1.0
            self.progress.advance(what, int(100 * (num_done + share * len(group))), 100 * total)

        with _measuring("quality_text"):
            if self.subject.not_elastic:
                for layers in group:
                    if layers.repair is not None or layers.prefill_skips != layers.decode_skips:
                        self.check_elastic()
                meter = await self.transformers()
                measured = meter.qualities(self.held_out, group)
                report(1, 1)
            else:
                engine = await self._meters.engine()
                await self._install_maps(engine, group)
                measured = await engine.qualities(self.held_out, group, report)
        known |= dict(zip(group, measured, strict=True))
        entry, key = self._quality_entry()
        rows = [MeasuredQuality(layers, quality) for layers, quality in known.items()]
        self._state.save("quality", key, entry, rows)

    async def _install_maps(self, meter: EngineMeter, selections: Sequence[LayerSelection]) -> None:
        """Have the engine ready for the maps of ``selections``."""
        for repair in {layers.repair for layers in selections if layers.repair is not None}:
            await meter.install(self._maps_path, repair)

    def _known_qualities(self) -> dict[LayerSelection, Quality]:
        if self._qualities is None:
            entry, key = self._quality_entry()
            rows = self._state.load("quality", key, entry) or []
            self._qualities = {row.layers: row.quality for row in rows}
        return self._qualities

    def _quality_entry(self) -> tuple[JsonEntry[list[MeasuredQuality]], dict[str, object]]:
        key = {**self.held_out_key}
        return JsonEntry(list[MeasuredQuality], key), key

    async def paces(
        self,
        selections: Sequence[LayerSelection],
        num_prompt: int,
        num_streams: int,
        what: str,
        quantized: Callable[[], Awaitable[Path]] | None = None,
    ) -> list[Pace]:
        """Return how fast each of ``selections`` runs on this machine.

        With ``quantized``, they are those of the checkpoint that it returns, in an engine of its
        own.
        """
        self.check_elastic()
        key = {
            **self.held_out_key,
            "layers": [asdict(layers) for layers in selections],
            "prompt_tokens": num_prompt,
            "streams": num_streams,
            "quantized_on": None if quantized is None else self.text_key,
            "hardware": describe_hardware(),
            "versions": measuring_versions(),
        }

        async def run(meter: EngineMeter) -> list[Pace]:
            await self._install_maps(meter, selections)
            prompts = self._windows.prompts(num_prompt, num_streams)
            return await meter.paces(prompts, _GENERATED, selections, self.reporting(what))

        async def measure() -> list[Pace]:
            if quantized is None:
                return await run(await self._meters.engine())
            async with self._meters.engine_of(await quantized()) as meter:
                return await run(meter)

        return await self.kept("paces", list[Pace], key, measure)

    async def accuracy(
        self, file: str, questions: Sequence[Question], layers: LayerSelection, what: str
    ) -> Accuracy:
        """Return the share of right answers at ``layers``, by log-likelihood per character."""
        self.check_elastic()
        asked = text_fingerprint([repr(question) for question in questions])
        key = {**self._base_key, "layers": asdict(layers), "questions": asked}

        async def measure() -> Accuracy:
            meter = await self._meters.engine()
            await self._install_maps(meter, [layers])
            with _measuring("questions"):
                return await accuracy(meter.engine, questions, layers, self.reporting(what))

        return await self.kept(f"accuracy-{file}", Accuracy, key, measure)

    async def transformers(self) -> TransformersMeter:
        """Return the model as transformers loads it; raises :class:`NotPossible` if it cannot."""
        return await self._meters.transformers()

    @property
    def windows(self) -> list[list[int]]:
        """Windows of the calibration text, of token ids."""
        return self._windows.calibration

    @property
    def held_out(self) -> list[list[int]]:
        """Windows of the held-out text, of token ids; two or more."""
        return self._windows.held_out

    async def kept(
        self,
        kind: str,
        type_: type[T],
        key: Mapping[str, object],
        measure: Callable[[], Awaitable[T]],
    ) -> T:
        """Return the measurement that is kept under ``key``, or else make and keep it."""
        entry: JsonEntry[T] = JsonEntry(type_, key)
        found = self._state.load(kind, key, entry)
        if found is None:
            self.budget.check()
            found = await measure()
            self._state.save(kind, key, entry, found)
        return found

    @cached_property
    def _measuring_key(self) -> dict[str, Any]:
        return {
            "model": self.subject.fingerprint,
            "tokenizer": self.subject.tokenizer,
            "engine": "transformers" if self.subject.not_elastic else "elastic",
            "dtype": self.subject.dtype,
            "max_context": self.settings.max_context or 0,
            "engine_args": dict(self.settings.engine_args),
        }

    @property
    def _base_key(self) -> dict[str, object]:
        return {"method": _METHOD, **self._measuring_key}

    @cached_property
    def text_key(self) -> dict[str, object]:
        return {
            **self._base_key,
            "text": text_fingerprint(self.subject.texts),
            "num_tokens": self.settings.calibration_tokens,
        }

    @cached_property
    def held_out_key(self) -> dict[str, object]:
        return {
            **self._base_key,
            "held_out": text_fingerprint(self.subject.held_out_texts),
            "num_tokens": self.settings.quality_tokens,
        }

    def reporting(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress.advance(what, done, total)


@contextmanager
def _measuring(setting: str) -> Iterator[None]:
    """Raise :class:`StartError`, which names ``setting``, for what cannot be measured on it."""
    with refused_as(setting, ImportanceError, QualityError, ValueError):
        yield
