"""Importance metrics: what ranks the layers of a model, least important first.

One file for each metric, one interface: :class:`Metric`. A metric ranks by what one dense forward
pass showed (:class:`DensePass`), by what is lost without some layers (an evaluator, which the
caller injects), or by nothing but the layers' numbers.
"""

from __future__ import annotations

from pruning.metrics.angular_distance import AngularDistance
from pruning.metrics.base import Evidence, Metric, MetricError, Ranking
from pruning.metrics.block_influence import BlockInfluenceMetric
from pruning.metrics.dense_pass import (
    DensePass,
    DensePassEstimator,
    DensePassSums,
    dense_pass,
    measure_dense_pass,
    measure_dense_pass_sums,
)
from pruning.metrics.evaluator import (
    BudgetSpent,
    Evaluate,
    RememberedLosses,
    Selection,
)
from pruning.metrics.greedy_removal import GreedyRemoval
from pruning.metrics.norm import Norm
from pruning.metrics.position import ReverseOrder, Sequential
from pruning.metrics.relative_magnitude import RelativeMagnitude
from pruning.metrics.single_removal import SingleRemoval

__all__ = [
    "METRICS",
    "AngularDistance",
    "BlockInfluenceMetric",
    "BudgetSpent",
    "DensePass",
    "DensePassEstimator",
    "DensePassSums",
    "Evaluate",
    "Evidence",
    "GreedyRemoval",
    "Metric",
    "MetricError",
    "Norm",
    "Ranking",
    "RelativeMagnitude",
    "RememberedLosses",
    "ReverseOrder",
    "Selection",
    "Sequential",
    "SingleRemoval",
    "dense_pass",
    "measure_dense_pass",
    "measure_dense_pass_sums",
    "other_scores",
]

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        BlockInfluenceMetric(),
        RelativeMagnitude(),
        Norm(),
        ReverseOrder(),
        Sequential(),
        AngularDistance(),
        SingleRemoval(),
        GreedyRemoval(),
    )
}


def other_scores(measured: DensePass) -> dict[str, tuple[float, ...]]:
    """Return the scores of all metrics of a dense pass but block influence, by name."""
    metrics: list[Metric] = [RelativeMagnitude(), Norm()]
    if measured.angular_distances is not None:
        metrics.append(AngularDistance())
    evidence = Evidence(len(measured.block_influence.scores), measured)
    return {metric.name: metric.rank(evidence).scores for metric in metrics}
