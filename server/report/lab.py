"""What the sections of a report measure with: each measurement is made once, and kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pruning.checkpoint import CheckpointError, read_config
from pruning.depths import removal_order, skipped_layers
from pruning.fingerprint import text_fingerprint
from pruning.importance import BlockInfluence, ImportanceError
from pruning.metrics import METRICS, DensePass, Evidence, Ranking
from pruning.metrics.base import Need
from pruning.metrics.names import BLOCK_INFLUENCE
from pruning.quality import Quality, QualityError
from pruning.repair import RepairError, load_maps, maps_fingerprint
from pruning.text import TextError
from pruning.transformers_model import load_tokenizer
from pruning.weights import weight_bytes
from server.calibration.calibrator import WINDOW, text_windows
from server.calibration.hardware import describe_hardware
from server.calibration.layer_search import LayerSearch, search_text_tokens
from server.calibration.offline_plan import load_offline
from server.calibration.search_store import SearchStore
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition
from server.evaluation.multiple_choice import Accuracy, Question, accuracy
from server.model.inputs import StartError, refused_as
from server.model.source import ModelSource
from server.report.budget import Budget, BudgetSpent
from server.report.engine_meter import EngineMeter, Pace
from server.report.options import ReportOptions
from server.report.output import ReportDirectory
from server.report.subject import Subject
from server.report.transformers_meter import TransformersMeter
from server.state import JsonEntry
from server.state_keys import Measuring
from server.telemetry.progress import ProgressReport

_METHOD = 1
_SEARCH_WINDOW = 256
_MIN_WINDOW = 4
# Each group runs the dense model as well; after each one what was measured is kept.
_SELECTIONS_AT_A_TIME = 6
_UNKNOWN_CONTEXT_TOKENS = 2048
_GENERATED = 24

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NotPossible(Exception):
    """What a section measures cannot be had for this model, on this machine or as it was asked."""


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
        self._engine: EngineMeter | None = None
        self._transformers: TransformersMeter | None = None
        self._qualities: dict[LayerSelection, Quality] | None = None

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

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

        async def measure() -> BlockInfluence:
            report = self.reporting("Block Influence")
            with _measuring("calibration"):
                if self.subject.not_elastic:
                    return (await self.transformers()).importance(self.windows, report)
                return await (await self._started()).importance(self.windows, report)

        return await self.kept("importance", BlockInfluence, self.text_key, measure)

    async def dense_pass(self) -> DensePass:
        """Return what the metrics of the library measure at full depth."""

        async def measure() -> DensePass:
            meter = await self.transformers()
            with _measuring("calibration"):
                return meter.dense_pass(self.windows, self.reporting("Other metrics"))

        return await self.kept("dense-pass", DensePass, self.text_key, measure)

    async def ranking(self, metric: str, repair: str | None = None) -> Ranking:
        """Return the order of ``metric``; a search counts on the maps ``repair``."""
        need = METRICS[metric].need
        evidence = Evidence(self.num_layers)
        if need is Need.LOSSES:
            return await self._searched(metric, repair)
        if metric == BLOCK_INFLUENCE:
            scores = (await self.importance()).scores
            return Ranking(removal_order(scores), scores)
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
            meter = await self._started()
            if repair is not None:
                await meter.install(self._maps_path, repair)
            wanted = search_text_tokens(self.num_layers, self.settings.search_tokens)
            num_tokens = min(wanted, self.settings.calibration_tokens)
            windows = self._cut_in_two_or_more(
                self.subject.texts, num_tokens, "calibration", _SEARCH_WINDOW
            )
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
            meter = await self._started()
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
                engine = await self._started()
                for repair in {layers.repair for layers in group} - {None}:
                    assert repair is not None
                    await engine.install(self._maps_path, repair)
                measured = await engine.qualities(self.held_out, group, report)
        known |= dict(zip(group, measured, strict=True))
        entry, key = self._quality_entry()
        rows = [MeasuredQuality(layers, quality) for layers, quality in known.items()]
        self._state.save("quality", key, entry, rows)

    def _known_qualities(self) -> dict[LayerSelection, Quality]:
        if self._qualities is None:
            entry, key = self._quality_entry()
            rows = self._state.load("quality", key, entry) or []
            self._qualities = {row.layers: row.quality for row in rows}
        return self._qualities

    def _quality_entry(self) -> tuple[JsonEntry[list[MeasuredQuality]], dict[str, object]]:
        key = {**self.held_out_key}
        return JsonEntry(list[MeasuredQuality], key), key

    async def pace(self, layers: LayerSelection, num_prompt: int, num_streams: int) -> Pace:
        """Return how fast ``layers`` run on this machine."""
        self.check_elastic()
        key = {
            **self.held_out_key,
            "layers": asdict(layers),
            "prompt_tokens": num_prompt,
            "streams": num_streams,
            "hardware": describe_hardware(),
            "versions": measuring_versions(),
        }

        async def measure() -> Pace:
            meter = await self._started()
            if layers.repair is not None:
                await meter.install(self._maps_path, layers.repair)
            prompts = self._prompts(num_prompt, num_streams)
            return await meter.pace(prompts, _GENERATED, layers)

        return await self.kept("pace", Pace, key, measure)

    async def pace_of(
        self, checkpoint: Path, layers: LayerSelection, num_prompt: int, num_streams: int
    ) -> Pace:
        """Return how fast ``layers`` of another checkpoint run, in an engine of its own."""
        await self.close()
        source = ModelSource(checkpoint, self.subject.source.name)
        settings = self.settings.model_copy(update={"dtype": "auto"})
        meter = EngineMeter(settings, replace(self.subject, source=source))
        with refused_as("engine", Exception):
            await meter.start()
        try:
            return await meter.pace(self._prompts(num_prompt, num_streams), _GENERATED, layers)
        finally:
            await meter.close()

    def _prompts(self, num_tokens: int, number: int) -> list[list[int]]:
        windows = self.held_out
        return [windows[stream % len(windows)][:num_tokens] for stream in range(number)]

    async def accuracy(
        self, file: str, questions: Sequence[Question], layers: LayerSelection, what: str
    ) -> Accuracy:
        """Return the share of right answers at ``layers``, by log-likelihood per character."""
        self.check_elastic()
        asked = text_fingerprint([repr(question) for question in questions])
        key = {**self._base_key, "layers": asdict(layers), "questions": asked}

        async def measure() -> Accuracy:
            meter = await self._started()
            if layers.repair is not None:
                await meter.install(self._maps_path, layers.repair)
            with _measuring("questions"):
                return await accuracy(meter.engine, questions, layers, self.reporting(what))

        return await self.kept(f"accuracy-{file}", Accuracy, key, measure)

    async def transformers(self) -> TransformersMeter:
        """Return the model as transformers loads it; raises :class:`NotPossible` if it cannot."""
        if self._transformers is None:
            self.budget.check()
            if not self._fits_twice():
                await self.close()
            with self.progress.working("Loading the model with transformers"):
                try:
                    model, _ = load_offline(self.settings, self.subject.directory)
                except Exception as error:  # transformers has no base class
                    raise NotPossible(f"transformers cannot load the model: {error}") from error
            self._transformers = TransformersMeter(model)
        return self._transformers

    async def _started(self) -> EngineMeter:
        if self._engine is None:
            if not self._fits_twice():
                self._transformers = None
            meter = EngineMeter(self.settings, self.subject)
            with (
                self.progress.working("Starting the engine"),
                refused_as("engine", Exception),  # vLLM documents no base class of what it raises
            ):
                await meter.start()
            self._engine = meter
        return self._engine

    def _fits_twice(self) -> bool:
        """Return whether the engine and transformers can have the model in memory together."""
        import torch

        needed = 2 * weight_bytes(self.subject.directory)
        return not torch.cuda.is_available() and psutil.virtual_memory().available > 2 * needed

    @cached_property
    def windows(self) -> list[list[int]]:
        """Windows of the calibration text, of token ids."""
        return self._cut(self.subject.texts, self.settings.calibration_tokens, "calibration")

    @cached_property
    def held_out(self) -> list[list[int]]:
        """Windows of the held-out text, of token ids; two or more."""
        texts, num_tokens = self.subject.held_out_texts, self.settings.quality_tokens
        return self._cut_in_two_or_more(texts, num_tokens, "quality_text")

    def _cut_in_two_or_more(
        self, texts: Sequence[str], num_tokens: int, setting: str, window: int = WINDOW
    ) -> list[list[int]]:
        """Return as many windows as a standard error needs: shorter ones of little text."""
        windows = self._cut(texts, num_tokens, setting, window)
        if len(windows) < 2:
            half = (len(windows[0]) + 1) // 2
            windows = self._cut(texts, num_tokens, setting, max(half, _MIN_WINDOW))
        if len(windows) < 2:
            raise StartError(
                f"{setting}: got {len(windows[0])} tokens, allowed: {2 * _MIN_WINDOW} or more"
            )
        return windows

    def _cut(
        self, texts: Sequence[str], num_tokens: int, setting: str, window: int = WINDOW
    ) -> list[list[int]]:
        tokenizer = self._tokenizer

        def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
            # Quiet, for a text longer than the context is cut into windows.
            return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)

        config = read_config(self.subject.directory)
        config = config.get("text_config") or config
        context = config.get("max_position_embeddings") or _UNKNOWN_CONTEXT_TOKENS
        with refused_as(setting, TextError):
            return text_windows(
                tokenize,
                texts,
                max_context=min(context, self.settings.max_context or context),
                max_tokens=num_tokens,
                vocab_size=config.get("vocab_size") or len(tokenizer),
                window=window,
            )

    @cached_property
    def _tokenizer(self) -> Any:
        with refused_as("model", CheckpointError):
            return load_tokenizer(self.subject.directory, trust=self.settings.trust_remote_code)

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
