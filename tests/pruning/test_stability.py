"""How sure an order of layers is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.metrics import METRICS, DensePassSums
from pruning.stability import (
    CONFIDENCE,
    MIN_GROUPS,
    interval,
    kendall,
    order_of,
    overlap,
    resampled_orders,
    settlement,
    spearman,
)

BI = METRICS["block_influence"]
DENSE = ("block_influence", "relative_magnitude", "norm", "angular_distance")


def sums_of(scores: Sequence[float], num_tokens: int = 100) -> DensePassSums:
    """What a group of windows adds up to whose layers score like that by every metric."""
    moments = []
    for score in scores:
        of_layer = [float(num_tokens)]
        for value in (score, score, -score):
            of_layer += [value * num_tokens, value * value * num_tokens]
        moments.append(of_layer)
    streams = [0.0, *itertools.accumulate(scores)]
    angles = [[abs(a - b) for b in streams] for a in streams]
    return DensePassSums(moments, angles, 1)


def noisy(scores: Sequence[float], noise: float, num_groups: int, seed: int) -> list[DensePassSums]:
    rng = random.Random(seed)
    return [
        sums_of([score + rng.gauss(0, noise) for score in scores], rng.randrange(50, 500))
        for _ in range(num_groups)
    ]


orders = st.integers(2, 12).flatmap(
    lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n)))
)


@given(orders)
def test_correlations_are_those_of_their_definitions(pair: tuple[list[int], list[int]]) -> None:
    first, second = (tuple(each) for each in pair)
    n = len(first)
    x = [first.index(layer) for layer in range(n)]
    y = [second.index(layer) for layer in range(n)]
    mean = (n - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    variance = sum((a - mean) ** 2 for a in x)
    assert spearman(first, second) == pytest.approx(covariance / variance)
    pairs = itertools.combinations(range(n), 2)
    signs = [1 if (x[i] - x[j]) * (y[i] - y[j]) > 0 else -1 for i, j in pairs]
    assert kendall(first, second) == pytest.approx(sum(signs) / len(signs))


@given(orders)
def test_correlations_are_bounded_and_symmetric(pair: tuple[list[int], list[int]]) -> None:
    first, second = (tuple(each) for each in pair)
    for correlation in (spearman, kendall):
        assert -1 - 1e-12 <= correlation(first, second) <= 1
        assert correlation(first, second) == correlation(second, first)
        assert correlation(first, first) == 1
        assert correlation(first, first[::-1]) == pytest.approx(-1)
        assert (correlation(first, second) == 1) is (first == second)
    for count in range(1, len(first) + 1):
        assert 0 <= overlap(first, second, count) <= 1
        assert overlap(first, first, count) == 1
    assert overlap(first, second, len(first)) == 1


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.sampled_from(DENSE))
def test_groups_that_are_alike_are_settled(scores: list[float], name: str) -> None:
    groups = [sums_of(scores)] * MIN_GROUPS
    found = settlement(groups, METRICS[name], range(1, len(scores)))
    assert found is not None
    # Sums of equal numbers may differ by rounding, and so may layers that are all but equal.
    distinct = len({round(score, 6) for score in scores}) == len(scores)
    if distinct and name != "angular_distance":
        assert found.is_settled
        assert set(found.agreement.values()) == {1.0}
        assert set(found.rivals.values()) == {()}


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(MIN_GROUPS, 30), st.sampled_from(DENSE))
def test_the_same_sums_give_the_same_answer(seed: int, num_groups: int, name: str) -> None:
    groups = noisy([0.1, 0.2, 0.22, 0.5, 0.21], 0.05, num_groups, seed)
    first = settlement(groups, METRICS[name], [1, 2, 3])
    assert first == settlement(list(groups), METRICS[name], {3, 2, 1, 0})
    assert first is not None
    for count, share in first.agreement.items():
        assert 0 <= share <= 1
        assert bool(first.rivals[count]) is (share < 1)
    assert first.is_settled is all(share >= CONFIDENCE for share in first.agreement.values())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(DENSE))
def test_every_resample_is_an_order_of_all_layers(seed: int, name: str) -> None:
    groups = noisy([0.3, 0.1, 0.2, 0.4], 0.1, 9, seed)
    found = resampled_orders(groups, METRICS[name], num_resamples=20, seed=seed)
    assert len(found) == 20
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)


def test_a_resample_ranks_as_its_windows_do_together() -> None:
    """Against a slow bootstrap that adds up the windows one by one."""
    import numpy as np

    groups = noisy([0.3, 0.1, 0.2, 0.4, 0.25], 0.1, 10, seed=5)
    weights = np.random.default_rng(3).multinomial(10, [0.1] * 10, size=12)
    for name in DENSE:
        slow = [
            order_of(
                [each for each, count in zip(groups, row, strict=True) for _ in range(count)],
                METRICS[name],
            )
            for row in weights.tolist()
        ]
        assert resampled_orders(groups, METRICS[name], num_resamples=12, seed=3) == slow, name


def test_layers_that_are_close_are_not_settled_between_them() -> None:
    groups = [sums_of([0.1, 0.2, 0.21, 0.9]), sums_of([0.1, 0.21, 0.2, 0.9])] * 8
    found = settlement(groups, BI, [1, 2, 3])
    assert found is not None
    assert (found.agreement[1], found.agreement[3]) == (1.0, 1.0)
    assert found.agreement[2] < CONFIDENCE
    assert found.rivals == {1: (), 2: (1, 2), 3: ()}
    assert not found.is_settled
    only = settlement(groups, BI, [1, 3])
    assert only is not None
    assert only.is_settled, "at the depths in use"


def test_more_text_settles_what_differs_at_all() -> None:
    few = settlement(noisy([0.1, 0.2, 0.21, 0.9], 0.05, 8, seed=2), BI, [2])
    many = settlement(noisy([0.1, 0.2, 0.21, 0.9], 0.05, 2000, seed=2), BI, [2])
    assert few is not None
    assert many is not None
    assert not few.is_settled
    assert many.is_settled


def test_too_little_to_tell() -> None:
    groups = noisy([0.1, 0.2], 0.01, MIN_GROUPS, seed=0)
    assert settlement(groups[1:], BI, [1]) is None
    assert settlement(groups, BI, [0]) is None
    assert settlement(groups, BI, []) is None


def test_the_interval_holds_the_middle_of_the_resamples() -> None:
    found = interval(0.5, [number / 1000 for number in range(1001)])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.025, 0.975))
    with pytest.raises(ValueError, match="resampled: got none, allowed: 1 or more"):
        interval(0.5, [])


@pytest.mark.parametrize(
    ("first", "second"), [((0,), (0,)), ((0, 1), (0, 2)), ((0, 1), (0, 1, 2)), ((0, 0), (0, 0))]
)
def test_orders_of_different_layers_are_refused(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    for correlation in (spearman, kendall):
        with pytest.raises(ValueError, match="allowed: two orders of the same two or more layers"):
            correlation(first, second)
    with pytest.raises(ValueError, match="num_skipped: got 0, allowed: 1 to 2"):
        overlap((0, 1), (1, 0), 0)
