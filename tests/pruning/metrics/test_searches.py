"""The metrics that search, against searches that look at everything."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest

from pruning.metrics import (
    METRICS,
    BudgetSpent,
    Evaluate,
    Evidence,
    GreedyRemoval,
    MetricError,
    RememberedLosses,
    Selection,
)
from pruning.metrics.names import METRIC_NAMES
from tests.pruning.metrics.subjects import Subject


def full_greedy(loss_of: Callable[[Selection], float], num_layers: int, limit: int) -> list[int]:
    """Remove the best layer again and again, looking at all that are left each time."""
    removed: list[int] = []
    while len(removed) < limit:
        left = [layer for layer in range(num_layers) if layer not in removed]
        losses = {layer: loss_of(tuple(sorted([*removed, layer]))) for layer in left}
        removed.append(min(left, key=lambda layer: (losses[layer], -layer)))
    return removed


def supermodular(seed: int, num_layers: int) -> Callable[[Selection], float]:
    """A loss that grows the faster the more is removed, as pairs of layers cost extra."""
    rng = random.Random(seed)
    single = [rng.uniform(0, 1) for _ in range(num_layers)]
    pairs = {pair: rng.uniform(0, 0.5) for pair in combinations(range(num_layers), 2)}

    def loss(selection: Selection) -> float:
        return sum(single[layer] for layer in selection) + sum(
            pairs[pair] for pair in combinations(selection, 2)
        )

    return loss


def evaluator_of(loss_of: Callable[[Selection], float]) -> Evaluate:
    return lambda selections: [loss_of(selection) for selection in selections]


def test_the_registry_has_every_name_once() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def test_single_removal(subject: Subject) -> None:
    ranking = METRICS["single_removal_kl"].rank(
        Evidence(subject.num_layers, evaluate=subject.evaluate)
    )
    expected = [subject.kl((layer,)) for layer in range(subject.num_layers)]
    assert ranking.scores == pytest.approx(expected, rel=1e-12)
    assert ranking.removal_order == tuple(sorted(range(len(expected)), key=expected.__getitem__))


def test_greedy(subject: Subject) -> None:
    num_layers = subject.num_layers
    limit = num_layers - 1
    ranking = GreedyRemoval(limit).rank(Evidence(num_layers, evaluate=subject.evaluate))
    assert list(ranking.removal_order[:limit]) == full_greedy(subject.kl, num_layers, limit)
    for count in range(1, limit + 1):
        removed = ranking.removal_order[:count]
        assert ranking.scores[removed[-1]] == pytest.approx(subject.kl(tuple(sorted(removed))))


@pytest.mark.parametrize("seed", range(20))
def test_laziness_loses_nothing_where_costs_only_grow(seed: int) -> None:
    loss_of = supermodular(seed, 12)
    remembered = RememberedLosses(evaluator_of(loss_of))
    ranking = GreedyRemoval(10).rank(Evidence(12, evaluate=remembered))
    assert list(ranking.removal_order[:10]) == full_greedy(loss_of, 12, 10)
    # All of them would be 1 + 12 + 11 + ... + 3.
    assert len(remembered.losses) < 76


def test_it_removes_half_unless_told_otherwise() -> None:
    remembered = RememberedLosses(evaluator_of(supermodular(0, 8)))
    ranking = METRICS["greedy_kl"].rank(Evidence(8, evaluate=remembered))
    assert sorted(ranking.removal_order) == list(range(8))
    assert max(map(len, remembered.losses)) == 4
    by_order = [ranking.scores[layer] for layer in ranking.removal_order]
    assert by_order == sorted(by_order), "sums of costs go on where the search ends"


def test_a_search_is_cut_short_by_its_budget_and_goes_on_from_there() -> None:
    loss_of = supermodular(1, 10)
    whole = GreedyRemoval(8).rank(Evidence(10, evaluate=evaluator_of(loss_of)))
    kept: dict[Selection, float] = {}
    short = RememberedLosses(evaluator_of(loss_of), max_evaluations=17, on_evaluated=kept.update)
    ranking = GreedyRemoval(8).rank(Evidence(10, evaluate=short))
    assert len(short.losses) == len(kept) == 17
    assert sorted(ranking.removal_order) == list(range(10))
    assert ranking != whole

    evaluated: list[Selection] = []

    def evaluate(selections: Sequence[Selection]) -> list[float]:
        evaluated.extend(selections)
        return [loss_of(selection) for selection in selections]

    resumed = RememberedLosses(evaluate, losses=kept)
    assert GreedyRemoval(8).rank(Evidence(10, evaluate=resumed)) == whole
    assert evaluated
    assert not kept.keys() & set(evaluated), "nothing is evaluated twice"


def test_a_budget_too_small_for_the_layers_alone_is_reported() -> None:
    short = RememberedLosses(evaluator_of(supermodular(1, 10)), max_evaluations=10)
    with pytest.raises(BudgetSpent):
        METRICS["greedy_kl"].rank(Evidence(10, evaluate=short))
    assert not short.losses


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    remembered = RememberedLosses(evaluator_of(lambda selection: value if selection else 0.0))
    with pytest.raises(ValueError, match=rf"loss: got {value} without the layers \[0\], allowed"):
        METRICS["greedy_kl"].rank(Evidence(3, evaluate=remembered))


@pytest.mark.parametrize("name", ["single_removal_kl", "greedy_kl"])
def test_without_an_evaluator_the_metric_says_so(name: str) -> None:
    with pytest.raises(MetricError, match=f"{name}: needs an evaluator of layer selections"):
        METRICS[name].rank(Evidence(4))


def test_more_layers_than_there_are_cannot_be_removed() -> None:
    with pytest.raises(ValueError, match="max_removed: got 4, allowed: 0 to 3"):
        GreedyRemoval(4).rank(Evidence(3, evaluate=evaluator_of(supermodular(0, 3))))
