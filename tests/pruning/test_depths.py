from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.depths import (
    check_depth,
    check_removal_order,
    depth_of_prune_ratio,
    prune_ratio_of_depth,
    removal_order,
    skipped_layers,
)

num_layers_ = st.integers(1, 200)
ratios = st.floats(0, 1, exclude_max=True)
layers_and_depth = num_layers_.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(num_layers_, ratios)
def test_never_prunes_more_than_asked_and_as_much_as_it_may(num_layers: int, ratio: float) -> None:
    depth = depth_of_prune_ratio(num_layers, ratio)
    removed = num_layers - depth
    tolerance = Fraction(1, 10**8)
    assert 1 <= depth <= num_layers
    assert removed <= num_layers * Fraction(ratio) + tolerance
    assert depth == 1 or removed + 1 > num_layers * Fraction(ratio)


@given(st.integers(1, 200), st.integers(0, 99))
def test_percentages_are_exact(num_layers: int, percent: int) -> None:
    removed = num_layers * percent // 100
    assert depth_of_prune_ratio(num_layers, percent / 100) == num_layers - removed


@pytest.mark.parametrize(
    ("num_layers", "ratio", "depth"),
    [(30, 0.1, 27), (10, 0.7, 3), (100, 0.29, 71), (3, 1 / 3, 2), (10, 1 - 9 / 10, 9), (16, 0, 16)],
)
def test_float_error_costs_no_layer(num_layers: int, ratio: float, depth: int) -> None:
    assert depth_of_prune_ratio(num_layers, ratio) == depth


def test_at_least_one_layer_runs() -> None:
    assert depth_of_prune_ratio(32, math.nextafter(1, 0)) == 1
    assert depth_of_prune_ratio(1, 0.99) == 1


@given(layers_and_depth)
def test_ratio_and_depth_are_inverse(layers: tuple[int, int]) -> None:
    num_layers, depth = layers
    assert depth_of_prune_ratio(num_layers, prune_ratio_of_depth(num_layers, depth)) == depth
    assert depth_of_prune_ratio(num_layers, 1 - depth / num_layers) == depth


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf, -0.1, 1.0, 1.5])
def test_refuses_other_ratios(ratio: float) -> None:
    with pytest.raises(
        ValueError, match=f"prune_ratio: got {ratio}, allowed: at least 0 and less than 1"
    ):
        depth_of_prune_ratio(12, ratio)


@pytest.mark.parametrize("depth", [0, -1, 13])
def test_refuses_other_depths(depth: int) -> None:
    message = f"depth: got {depth}, allowed: 1 to 12"
    with pytest.raises(ValueError, match=message):
        check_depth(12, depth)
    with pytest.raises(ValueError, match=message):
        prune_ratio_of_depth(12, depth)
    with pytest.raises(ValueError, match=message):
        skipped_layers(range(12), depth)


def test_refuses_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match="num_layers: got 0"):
        depth_of_prune_ratio(0, 0.5)
    with pytest.raises(ValueError, match="num_layers: got 0"):
        removal_order([])


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=50))
def test_removal_order_is_a_permutation_by_score_then_depth(scores: list[float]) -> None:
    order = removal_order(scores)
    check_removal_order(order, len(scores))
    for first, second in pairwise(order):
        assert scores[first] < scores[second] or (
            scores[first] == scores[second] and first > second
        )


def test_of_equal_layers_the_deeper_goes_first() -> None:
    assert removal_order([0.5, 0.1, 0.5, 0.1]) == (3, 1, 2, 0)


def test_refuses_a_nan_score() -> None:
    with pytest.raises(ValueError, match="scores: got NaN for layer 1"):
        removal_order([0.1, math.nan])


@given(st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))), st.data())
def test_a_lower_depth_skips_more_of_the_same(order: list[int], data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, len(order)))
    skipped = skipped_layers(order, depth)
    assert list(skipped) == sorted(set(skipped))
    assert len(skipped) == len(order) - depth
    assert set(skipped) == set(order[: len(order) - depth])
    if depth > 1:
        assert set(skipped) < set(skipped_layers(order, depth - 1))


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        ((0, 1), "2 layers"),
        ((0, 1, 3), "layer 3"),
        ((0, -1, 2), "layer -1"),
        ((0, 2, 2), "layer 2 more than once"),
    ],
)
def test_refuses_what_is_no_permutation(order: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=f"removal_order: got {problem}, allowed: each of"):
        check_removal_order(order, 3)
