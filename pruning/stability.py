"""Stability: how sure the order of the layers is, given how much the windows of text differ.

The windows of a text are resampled with replacement (the bootstrap; Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993), and the layers are ranked anew on each resample. What comes
out the same nearly every time does not depend on the windows that there happened to be.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from pruning.importance import BlockInfluence
from pruning.layer_means import LayerMeans
from pruning.metrics import DensePass, DensePassSums, Evidence, Metric, dense_pass

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NUM_RESAMPLES = 200
# The share of the resamples in which a depth must skip the same layers for it to be settled.
CONFIDENCE = 0.95
# Fewer groups of windows say too little about how much windows differ.
MIN_GROUPS = 8

Order = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the bounds within which 95 % of the resamples are."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Settlement:
    """Whether the layers that are skipped would be the same on other windows of the same text.

    ``agreement`` has, by the number of skipped layers, the share of the resamples that skip the
    same. ``rivals`` are the layers that some resamples skip and others do not, by that number,
    ascending; none where all agree.
    """

    agreement: dict[int, float]
    rivals: dict[int, tuple[int, ...]]

    @property
    def is_settled(self) -> bool:
        return all(share >= CONFIDENCE for share in self.agreement.values())


def settlement(
    sums: Sequence[DensePassSums],
    metric: Metric,
    num_skipped: Collection[int],
    *,
    seed: int = 0,
) -> Settlement | None:
    """Return how settled the order by ``metric`` is where so many layers are skipped.

    ``sums`` are those of groups of windows, and ``metric`` ranks by a dense pass. The same sums
    and seed always give the same answer. None where there are fewer than ``MIN_GROUPS`` groups,
    or nothing is skipped. Raises what the metric and :func:`pruning.metrics.dense_pass` raise.
    """
    counts = sorted({count for count in num_skipped if count > 0})
    if len(sums) < MIN_GROUPS or not counts:
        return None
    order = order_of(sums, metric)
    resampled = resampled_orders(sums, metric, seed=seed)
    agreement, rivals = {}, {}
    for count in counts:
        skipped = set(order[:count])
        others = [set(each[:count]) for each in resampled]
        agreement[count] = sum(each == skipped for each in others) / len(others)
        rivals[count] = tuple(sorted(set().union(*(each ^ skipped for each in others))))
    return Settlement(agreement, rivals)


def order_of(sums: Sequence[DensePassSums], metric: Metric) -> Order:
    """Return the order in which ``metric`` removes the layers, on all groups together."""
    measured = dense_pass(sums)
    return metric.rank(Evidence(len(measured.block_influence.scores), measured)).removal_order


def resampled_orders(
    sums: Sequence[DensePassSums],
    metric: Metric,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Order]:
    """Return the order on each of ``num_resamples`` resamples of the groups.

    The same sums and seed always give the same orders.
    """
    import numpy as np

    num_groups = len(sums)
    weights = np.random.default_rng(seed).multinomial(
        num_groups, [1 / num_groups] * num_groups, size=num_resamples
    )
    totals = _weighted(weights, [each.moments for each in sums])
    angles = None
    if all(each.angles is not None for each in sums):
        angles = _weighted(weights, [each.angles or () for each in sums])
    num_texts = weights @ np.array([each.num_texts for each in sums])
    num_layers = totals.shape[1]
    return [
        metric.rank(
            Evidence(
                num_layers,
                _resampled(
                    totals[number],
                    None if angles is None else angles[number] / num_texts[number],
                    int(num_texts[number]),
                ),
            )
        ).removal_order
        for number in range(num_resamples)
    ]


def spearman(first: Order, second: Order) -> float:
    """Return Spearman's rank correlation of two orders of the same layers, -1 to 1.

    That is 1 - 6 sum(d ** 2) / (n (n ** 2 - 1)), with d the difference of a layer's positions.
    Raises :class:`ValueError` unless both order the same two or more layers.
    """
    mine, other = _positions(first, second)
    n = len(mine)
    squares = sum((mine[layer] - other[layer]) ** 2 for layer in mine)
    return 1 - 6 * squares / (n * (n * n - 1))


def kendall(first: Order, second: Order) -> float:
    """Return Kendall's rank correlation (tau) of two orders of the same layers, -1 to 1.

    That is the share of the pairs of layers that both have in the same order, minus the share of
    the others. Raises :class:`ValueError` as :func:`spearman` does.
    """
    mine, other = _positions(first, second)
    pairs = list(combinations(mine, 2))
    same = sum((mine[a] < mine[b]) == (other[a] < other[b]) for a, b in pairs)
    return 2 * same / len(pairs) - 1


def overlap(first: Order, second: Order, num_skipped: int) -> float:
    """Return the share of the first ``num_skipped`` layers that both orders have there."""
    if not 1 <= num_skipped <= len(first):
        raise ValueError(f"num_skipped: got {num_skipped}, allowed: 1 to {len(first)}")
    _positions(first, second)
    return len({*first[:num_skipped]} & {*second[:num_skipped]}) / num_skipped


def interval(value: float, resampled: Sequence[float]) -> Interval:
    """Return ``value`` with the 2.5th and 97.5th percentiles of what the resamples gave.

    A resample is noisier than the text itself, so that correlations of resamples are mostly lower
    than that of the texts: read the bounds as those of a noisier measurement. Raises
    :class:`ValueError` for no resamples.
    """
    import numpy as np

    if not resampled:
        raise ValueError("resampled: got none, allowed: 1 or more")
    low, high = np.percentile(list(resampled), [2.5, 97.5]).tolist()
    return Interval(value, low, high)


def _positions(first: Order, second: Order) -> tuple[dict[int, int], dict[int, int]]:
    mine, other = ({layer: at for at, layer in enumerate(each)} for each in (first, second))
    if len(first) < 2 or mine.keys() != other.keys() or {len(first), len(second)} != {len(mine)}:
        raise ValueError(
            f"orders: got {list(first)} and {list(second)}, allowed: two orders of the same two or "
            "more layers"
        )
    return mine, other


def _weighted(
    weights: npt.NDArray[np.int64], of_groups: Sequence[Sequence[Sequence[float]]]
) -> npt.NDArray[np.float64]:
    """Return the sums of each resample, [num_resamples, rows, columns]."""
    import numpy as np

    values = np.array(of_groups, dtype=np.float64)
    return np.asarray(np.tensordot(weights.astype(np.float64), values, axes=1), np.float64)


def _resampled(
    moments: npt.NDArray[np.float64], angles: npt.NDArray[np.float64] | None, num_texts: int
) -> DensePass:
    """Return what a resample of the windows measures; its standard errors are not known."""
    num_tokens = int(moments[0, 0])
    unknown = (math.nan,) * len(moments)
    influence, magnitude, norm = (
        tuple((moments[:, column] / moments[:, 0]).tolist()) for column in (1, 3, 5)
    )
    return DensePass(
        BlockInfluence(influence, unknown, num_tokens),
        LayerMeans(magnitude, unknown, num_tokens),
        LayerMeans(norm, unknown, num_tokens),
        None if angles is None else tuple(map(tuple, angles.tolist())),
        num_texts,
    )
