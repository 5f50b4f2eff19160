"""What a metric is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from pruning.metrics.dense_pass import DensePass
from pruning.metrics.evaluator import Evaluate


class MetricError(ValueError):
    """A metric was not given what it ranks by."""


class Need(Enum):
    """What a metric ranks by, beside the number of layers."""

    NOTHING = "nothing"
    DENSE_PASS = "a dense pass"
    LOSSES = "an evaluator"


@dataclass(frozen=True, slots=True)
class Ranking:
    """All layers, least important first, and a score of each, indexed by layer.

    A low score speaks for leaving a layer out; the order need not be that of the scores.
    """

    removal_order: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What metrics rank by. What a metric does not need may be None."""

    num_layers: int
    dense_pass: DensePass | None = None
    evaluate: Evaluate | None = None


class Metric(Protocol):
    """What ranks the layers of a model."""

    @property
    def name(self) -> str:
        """What plans and settings call it."""

    @property
    def need(self) -> Need:
        """What :meth:`rank` must be given."""

    def rank(self, evidence: Evidence) -> Ranking:
        """Return the ranking.

        Raises :class:`MetricError` where ``evidence`` lacks what is needed, and what the
        evaluator raises.
        """


def needed_dense_pass(metric: Metric, evidence: Evidence) -> DensePass:
    """Return the dense pass that ``metric`` needs; raises :class:`MetricError` without one."""
    if evidence.dense_pass is None:
        raise MetricError(f"{metric.name}: needs what was measured in a dense pass")
    return evidence.dense_pass


def needed_evaluator(metric: Metric, evidence: Evidence) -> Evaluate:
    """Return the evaluator that ``metric`` needs; raises :class:`MetricError` without one."""
    if evidence.evaluate is None:
        raise MetricError(f"{metric.name}: needs an evaluator of layer selections")
    return evidence.evaluate
