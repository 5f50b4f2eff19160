"""Measures layers and depths with the engine that serves them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pruning.fingerprint import text_fingerprint
from pruning.importance import ImportanceError
from pruning.metrics import Evidence, MetricError, dense_pass
from pruning.metrics.names import BLOCK_INFLUENCE, GREEDY_KL
from pruning.plan import Plan
from pruning.probes import Probes
from pruning.quality import Quality, QualityError
from pruning.text import TextError
from server.calibration.layer_search import LayerSearch, search_text_tokens
from server.calibration.order_choice import OrderChoice
from server.calibration.order_stability import OrderStability
from server.calibration.probes import Prober
from server.calibration.search_store import SearchStore
from server.calibration.served_metrics import AUTO, find_metric, searches
from server.calibration.speed_meter import SpeedMeter
from server.calibration.text_windows import MIN_WINDOW, WINDOW, text_windows
from server.config.depth import DEFAULT_SEARCH_TOKENS
from server.depth.levels import DepthPair, LevelSpec
from server.depth.measured import Speed
from server.depth.policy import DepthPolicy
from server.engine.base import (
    Engine,
    RepairsLayers,
    never_enough,
)
from server.errors import FailedPrecondition, InvalidArgument

# That of the text that a search compares layers on. It is little, so its windows are shorter, and
# more documents are among them.
_SEARCH_WINDOW = 256

_MIN_TOKENS_OF_TWO_WINDOWS = 2 * MIN_WINDOW

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a measurement.

    ``phase`` is importance, search, orders, repair, levels, quality, probes or speed; in the
    phase orders, two orders of the layers are compared, and in the phase levels, engines are
    started for them.
    """

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


class Calibrator:
    """Measures one model: its layers on calibration text, its depths on held-out text.

    Measurements raise :class:`EngineDead` where the engine dies, and
    :class:`FailedPrecondition` where the model gives results that are not finite.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model_fingerprint: str,
        tokenizer_fingerprint: str = "",
        versions: Mapping[str, str],
        texts: Sequence[str],
        max_tokens: int,
        held_out_texts: Sequence[str],
        max_held_out_tokens: int,
        every_depth: bool,
        metric: str = BLOCK_INFLUENCE,
        search_tokens: int = DEFAULT_SEARCH_TOKENS,
        search_store: SearchStore | None = None,
        until_settled: bool = False,
    ) -> None:
        """Measure with an engine that has been started.

        ``every_depth``: whether quality is measured at all depths rather than at the levels
        alone. Layers are ranked by ``metric``; one that searches may run ``search_tokens``
        through the engine, and ``search_store`` keeps what it finds. With ``until_settled``, layers
        are ranked on no more text than it takes to be sure which ones the levels skip. Raises
        :class:`FailedPrecondition` where the held-out text has no tokens.
        """
        self._engine = engine
        self._model_fingerprint = model_fingerprint
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._versions = dict(versions)
        self._texts = texts
        self._max_tokens = max_tokens
        self._every_depth = every_depth
        self._metric = metric
        self._search_tokens = search_tokens
        self._search_store = search_store
        self._until_settled = until_settled
        try:
            self._held_out = self._two_windows_or_more(held_out_texts, max_held_out_tokens)
        except TextError as error:
            raise FailedPrecondition(f"the held-out text: {error}") from None
        start = engine.tokenize("")
        self._speed_meter = SpeedMeter(engine, self._held_out)
        self._prober = Prober(engine, [each[len(start) :] for each in self._held_out], start)

    async def measure_plan(
        self,
        on_progress: OnProgress,
        texts: Sequence[str] = (),
        max_tokens: int | None = None,
        metric: str | None = None,
        *,
        repair: str | None = None,
        depths: Sequence[DepthPair] = (),
    ) -> Plan:
        """Rank the layers on ``texts``, or on those of the server where there are none.

        They are ranked by ``metric``, or by the server's; Block Influence and what else one pass
        over the texts shows is measured in any case. ``repair`` is the fingerprint of the maps
        that stand in for skipped layers, and ``depths`` are those of the levels. The metric
        "auto" compares the order of Block Influence with that of greedy removal there, where the
        engine and ``search_tokens`` allow a search, and takes the better one.

        Raises :class:`InvalidArgument` for texts that give no tokens or none that the model
        knows, for too few tokens to measure on, and for an unknown metric;
        :class:`FailedPrecondition` for a search that the engine cannot do, or not within its
        tokens.
        """
        metric = self._metric if metric is None else metric
        is_auto = metric == AUTO
        if is_auto:
            metric = GREEDY_KL if self._engine.serves_any_depth else BLOCK_INFLUENCE
        chosen = find_metric(metric, self._engine)
        max_tokens = self._max_tokens if max_tokens is None else max_tokens
        if max_tokens < 2:
            raise InvalidArgument("max_tokens", max_tokens, "2 or more")
        windows = await asyncio.to_thread(self._calibration_windows, texts, max_tokens)
        search = None
        if searches(chosen.name):  # what is refused is refused before anything is measured
            try:
                search = await self._layer_search(texts, max_tokens, repair, on_progress)
            except (FailedPrecondition, InvalidArgument) as error:
                if not is_auto:
                    raise
                logger.warning("layers are ranked by %s: %s", BLOCK_INFLUENCE, error)
                chosen = find_metric(BLOCK_INFLUENCE, self._engine)
        stability = OrderStability(chosen, self._engine.model.num_layers, depths)
        with _measuring():
            sums = await self._engine.measure_importance(
                windows,
                _report(on_progress, "importance"),
                stability.is_settled if self._until_settled else never_enough,
            )
            measured = dense_pass(sums)
            settled = await stability.told(sums)
            evidence = Evidence(self._engine.model.num_layers, measured)
            own = None if search is not None else chosen.rank(evidence)
        plan = Plan.from_dense_pass(
            measured,
            model_fingerprint=self._model_fingerprint,
            text_fingerprint=text_fingerprint(texts or self._texts),
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            versions=self._versions,
        )
        if search is not None:
            with _measuring():
                searched = plan.ranked_by(chosen.name, await search.rank(chosen))
                if not is_auto:
                    return searched
                # Whatever is taken carries the scores of both.
                choice = OrderChoice(
                    self._engine,
                    self._prober,
                    self._held_out,
                    depths=depths,
                    repair=repair,
                    progress=_report(on_progress, "orders"),
                )
                plan = replace(plan, other_scores=searched.other_scores, settled=settled)
                return await choice.choose(plan, searched)
        assert own is not None
        return replace(plan.ranked_by(chosen.name, own), settled=settled)

    def check_limits(self, specs: Iterable[LevelSpec], fields: Iterable[str]) -> None:
        """Raise :class:`InvalidArgument` for a limit of what is not measured here.

        ``fields`` are what errors call each of ``specs``.
        """
        for spec, field in zip(specs, fields, strict=True):
            for kind, limit in spec.limits.items():
                problem = self._prober.problems.get(kind.word.strip())
                if problem is not None:
                    allowed = (
                        f"a depth, or another limit: {kind.word}is not measured, because {problem}"
                    )
                    raise InvalidArgument(f"{field}.{kind.value}", limit, allowed)

    async def fit_repair(self, engine: RepairsLayers, path: Path, on_progress: OnProgress) -> None:
        """Fit repair maps on the server's calibration text, and write them to ``path``.

        Raises :class:`pruning.repair.RepairError` as :meth:`RepairsLayers.fit_repair` does.
        """
        await engine.fit_repair(
            await self.training_windows(),
            path,
            model_fingerprint=self._model_fingerprint,
            text_fingerprint=text_fingerprint(self._texts),
            progress=_report(on_progress, "repair"),
        )

    async def training_windows(self) -> list[list[int]]:
        """Return the windows of the server's calibration text, of token ids."""
        return await asyncio.to_thread(self._calibration_windows, (), self._max_tokens)

    @property
    def held_out_windows(self) -> Sequence[Sequence[int]]:
        """The windows that quality is measured on, of token ids."""
        return self._held_out

    async def prepare(self, policy: DepthPolicy, on_progress: OnProgress) -> None:
        """Have the engine ready for every level of ``policy``.

        Raises :class:`FailedPrecondition` where that cannot be; nothing is changed then.
        """
        await self._engine.prepare(
            policy.plan, policy.level_selections(), _report(on_progress, "levels")
        )

    def depths_to_measure(self, policy: DepthPolicy) -> list[DepthPair]:
        """Return dense, the levels and, if so configured, all depths; the deepest first.

        Depths that no request may have are left out.
        """
        depths = set(self.depths_to_time(policy))
        if self._every_depth and policy.any_depth:
            depths |= {DepthPair(layers, layers) for layers in range(1, policy.num_layers + 1)}
        return sorted(depths, key=lambda pair: (-pair.decode_layers, -pair.prefill_layers))

    def depths_to_time(self, policy: DepthPolicy) -> list[DepthPair]:
        """Return dense, where a request may have it, and the levels; these are probed, too."""
        dense = [policy.dense] if policy.can_have(policy.dense) else []
        return list(dict.fromkeys([*dense, *(level.depths for level in policy.levels)]))

    async def measure_quality(
        self, policy: DepthPolicy, depths: Sequence[DepthPair], on_progress: OnProgress
    ) -> dict[DepthPair, Quality]:
        """Measure each of ``depths`` on the held-out text, under the policy's plan."""
        if not depths:
            return {}
        with _measuring():
            qualities = await self._engine.measure_quality(
                self._held_out,
                [policy.selection(pair) for pair in depths],
                _report(on_progress, "quality"),
            )
        return dict(zip(depths, qualities, strict=True))

    async def measure_probes(
        self, policy: DepthPolicy, depths: Sequence[DepthPair], on_progress: OnProgress
    ) -> dict[DepthPair, Probes]:
        """Measure how each of ``depths`` writes and chooses, under the policy's plan.

        The probes are made of the held-out text. What compares with the dense model is None where
        no request may have it.
        """
        if not depths:
            return {}
        probes = await self._prober.run(
            [policy.selection(pair) for pair in depths],
            _report(on_progress, "probes"),
            has_dense=policy.can_have(policy.dense),
        )
        return dict(zip(depths, probes, strict=True))

    async def measure_speed(
        self, policy: DepthPolicy, depths: Iterable[DepthPair], on_progress: OnProgress
    ) -> dict[DepthPair, Speed]:
        """Measure the throughput at each of ``depths`` and, if it can be, dense.

        The load is that of :class:`SpeedMeter`, with prompts from the held-out text.
        """
        return await self._speed_meter.measure(policy, depths, _report(on_progress, "speed"))

    async def _layer_search(
        self, texts: Sequence[str], max_tokens: int, repair: str | None, on_progress: OnProgress
    ) -> LayerSearch:
        wanted = search_text_tokens(self._engine.model.num_layers, self._search_tokens)
        windows = await asyncio.to_thread(self._search_windows, texts, min(wanted, max_tokens))
        store = self._search_store
        return LayerSearch(
            self._engine,
            windows,
            max_tokens=self._search_tokens,
            repair=repair,
            kept=None if store is None else store.on(windows, repair),
            progress=_report(on_progress, "search"),
        )

    def _calibration_windows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        with _calibrating_on(texts):
            return self._windows(texts or self._texts, max_tokens)

    def _search_windows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        with _calibrating_on(texts):
            return self._two_windows_or_more(texts or self._texts, max_tokens, _SEARCH_WINDOW)

    def _two_windows_or_more(
        self, texts: Sequence[str], max_tokens: int, window: int = WINDOW
    ) -> list[list[int]]:
        """Return as many windows as a standard error needs: shorter ones of little text."""
        windows = self._windows(texts, max_tokens, window)
        if len(windows) > 1:
            return windows
        num_tokens = len(windows[0]) - len(self._engine.tokenize(""))
        if num_tokens < _MIN_TOKENS_OF_TWO_WINDOWS:
            raise TextError(
                f"{num_tokens} tokens of it can be used, allowed: {_MIN_TOKENS_OF_TWO_WINDOWS} or "
                "more"
            )
        return self._windows(texts, max_tokens, window=(num_tokens + 1) // 2)

    def _windows(
        self, texts: Sequence[str], max_tokens: int, window: int = WINDOW
    ) -> list[list[int]]:
        model = self._engine.model
        return text_windows(
            self._engine.tokenize,
            texts,
            max_context=model.max_context,
            max_tokens=max_tokens,
            vocab_size=model.vocab_size,
            window=window,
        )


def _report(on_progress: OnProgress, phase: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(Progress(phase, done, total))


@contextmanager
def _calibrating_on(texts: Sequence[str]) -> Iterator[None]:
    """Refuse ``texts``, or where there are none those of the server, if they are no use."""
    try:
        yield
    except TextError as error:
        if texts:
            raise InvalidArgument("texts", list(texts), f"texts with tokens ({error})") from None
        raise FailedPrecondition(f"the calibration text: {error}") from None


@contextmanager
def _measuring() -> Iterator[None]:
    try:
        yield
    except (ImportanceError, MetricError, QualityError) as error:
        raise FailedPrecondition(f"this model cannot be measured on this text: {error}") from error
