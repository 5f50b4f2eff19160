"""The choice between two orders in which layers are left out, on text that fitted neither."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pruning.plan import Plan
from pruning.probes import Probes
from pruning.quality import Quality
from server.calibration.probes import Prober
from server.depth.levels import DepthPair
from server.engine.base import Engine, LayerSelection, ProgressCallback

PERPLEXITY, WRITING, CHOOSING = "perplexity", "writing", "choosing"

# Shares of all layers, where it is not known which depths levels will use.
_SHARES = (0.9, 0.8, 0.65)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrderLosses:
    """What an order loses against the dense model, by measure, as a mean over depths.

    Perplexity: the logarithm of the ratio to dense, in nats. Writing: that of the writing probe,
    plus the share of repeated 4-grams above the dense model's own. Choosing: accuracy. A measure
    that was not taken at some depth is absent.
    """

    metric: str
    losses: Mapping[str, float]


def mean_losses(
    metric: str,
    qualities: Sequence[Quality],
    dense_quality: Quality,
    probes: Sequence[Probes],
    dense_probes: Probes,
) -> OrderLosses:
    """Return the mean losses of an order, measured at one or more depths."""
    by_measure: dict[str, list[float | None]] = {
        PERPLEXITY: [_log_ratio(each.perplexity / dense_quality.perplexity) for each in qualities],
        WRITING: [_writing_loss(each) for each in probes],
        CHOOSING: [_choosing_loss(each, dense_probes) for each in probes],
    }
    losses = {}
    for measure, values in by_measure.items():
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):
            losses[measure] = math.fsum(known) / len(known)
    return OrderLosses(metric, losses)


def better(first: OrderLosses, second: OrderLosses) -> OrderLosses:
    """Return what loses less by more of the measures; the first where they are even."""
    votes = [preferred(first, second, measure) for measure in (PERPLEXITY, WRITING, CHOOSING)]
    return second if votes.count(second) > votes.count(first) else first


def preferred(first: OrderLosses, second: OrderLosses, measure: str) -> OrderLosses | None:
    """Return what loses less by that measure; None where they are even or it was not taken."""
    mine, other = first.losses.get(measure), second.losses.get(measure)
    if mine is None or other is None or mine == other:
        return None
    return first if mine < other else second


class OrderChoice:
    """Measures two orders at the same depths, and takes the better one."""

    def __init__(
        self,
        engine: Engine,
        prober: Prober,
        windows: Sequence[Sequence[int]],
        *,
        depths: Sequence[DepthPair],
        repair: str | None,
        progress: ProgressCallback,
    ) -> None:
        """Compare on ``windows`` of text that neither order was fitted on, and by its probes.

        ``depths`` are those of the levels; without any that is pruned, some are tried that levels
        may have. ``repair`` is the fingerprint of the maps that stand in for skipped layers.
        """
        self._engine = engine
        self._prober = prober
        self._windows = windows
        self._repair = repair
        self._progress = progress
        num_layers = engine.model.num_layers
        dense = DepthPair(num_layers, num_layers)
        tried = [max(int(num_layers * share), 1) for share in _SHARES]
        self._depths = [pair for pair in dict.fromkeys(depths) if pair != dense] or [
            DepthPair(depth, depth) for depth in dict.fromkeys(tried)
        ]

    async def choose(self, first: Plan, second: Plan) -> Plan:
        """Return the better plan; the first where they are even.

        Raises what measuring raises in the engine.
        """
        selections = [
            [self._selection(plan, pair) for pair in self._depths] for plan in (first, second)
        ]
        if selections[0] == selections[1]:
            logger.info(
                "%s and %s leave out the same layers at the depths that are compared; the order is "
                "that of %s",
                first.metric,
                second.metric,
                first.metric,
            )
            return first
        every = [LayerSelection(), *selections[0], *selections[1]]
        halves = _Halves(self._progress)
        dense_quality, *qualities = await self._engine.measure_quality(
            self._windows, every, halves.first
        )
        dense_probes, *probes = await self._prober.run(every, halves.second, has_dense=True)
        halves.finish()
        n = len(self._depths)
        of_first, of_second = (
            mean_losses(
                plan.metric,
                qualities[start : start + n],
                dense_quality,
                probes[start : start + n],
                dense_probes,
            )
            for plan, start in ((first, 0), (second, n))
        )
        chosen = better(of_first, of_second)
        self._report(of_first, of_second, chosen)
        return first if chosen is of_first else second

    def _selection(self, plan: Plan, pair: DepthPair) -> LayerSelection:
        return LayerSelection(
            prefill_skips=tuple(sorted(plan.skipped(pair.prefill_layers))),
            decode_skips=tuple(sorted(plan.skipped(pair.decode_layers))),
            repair=self._repair,
        )

    def _report(self, first: OrderLosses, second: OrderLosses, chosen: OrderLosses) -> None:
        other = second if chosen is first else first
        depths = ", ".join(map(str, self._depths))
        losses = ", ".join(
            f"{measure} {chosen.losses[measure]:.3f} against {other.losses[measure]:.3f}"
            for measure in (PERPLEXITY, WRITING, CHOOSING)
            if measure in chosen.losses and measure in other.losses
        )
        logger.info(
            "layers are left out in the order of %s rather than of %s; mean losses at depths %s: "
            "%s",
            chosen.metric,
            other.metric,
            depths,
            losses,
        )
        writes, chooses = (preferred(first, second, each) for each in (WRITING, CHOOSING))
        if writes is not None and chooses is not None and writes is not chooses:
            logger.warning(
                "%s writes better and %s chooses better; 'metric' can name the one that your "
                "requests need",
                writes.metric,
                chooses.metric,
            )


class _Halves:
    """One progress of two measurements, each of which is a half of it."""

    _PARTS = 1000

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress

    def first(self, done: int, total: int) -> None:
        self._progress(self._PARTS * done // total // 2, self._PARTS)

    def second(self, done: int, total: int) -> None:
        self._progress((self._PARTS + self._PARTS * done // total) // 2, self._PARTS)

    def finish(self) -> None:
        self._progress(self._PARTS, self._PARTS)


def _log_ratio(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf


def _writing_loss(probes: Probes) -> float | None:
    writing = probes.writing
    if writing is None or writing.ratio is None or writing.dense_repeated_share is None:
        return None
    return _log_ratio(writing.ratio) + writing.repeated_share - writing.dense_repeated_share


def _choosing_loss(probes: Probes, dense: Probes) -> float | None:
    if probes.choosing is None or dense.choosing is None:
        return None
    return dense.choosing.accuracy - probes.choosing.accuracy
