"""How a pruned model chooses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import NUM_CHOICES, Choosing, Passage, choices, choosing
from pruning.probes.choosing import share_stderr

INDEX = st.integers(0, NUM_CHOICES - 1)


def passage(true_index: int) -> Passage:
    return Passage((1,), tuple((i,) for i in range(NUM_CHOICES)), true_index)


@given(st.lists(st.lists(st.floats(-100, 0), min_size=NUM_CHOICES, max_size=NUM_CHOICES)))
def test_the_most_likely_is_chosen(logprobs: list[list[float]]) -> None:
    for chosen, each in zip(choices(logprobs), logprobs, strict=True):
        assert each[chosen] == max(each)
        assert each[chosen] not in each[:chosen], "the first among equals"


@given(st.lists(st.tuples(INDEX, INDEX, INDEX), min_size=1, max_size=40))
def test_against_a_direct_count(items: list[tuple[int, int, int]]) -> None:
    result = choosing(
        [passage(true) for true, _, _ in items],
        [chosen for _, chosen, _ in items],
        [dense for _, _, dense in items],
    )
    right = [true == chosen for true, chosen, _ in items]
    same = [chosen == dense for _, chosen, dense in items]
    assert result.accuracy == sum(right) / len(items)
    assert result.agreement == sum(same) / len(items)
    assert result.accuracy_stderr == share_stderr(sum(right), len(items))
    assert result.agreement_stderr == share_stderr(sum(same), len(items))
    assert (result.num_items, result.chance) == (len(items), 0.25)


@given(st.integers(1, 500), st.data())
def test_no_share_looks_surer_than_its_items_can_make_it(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    # The root of the quotient, as it is rounded there: at a half the two are equal.
    assert 0 < share_stderr(count, total) <= math.sqrt(0.25 / (total + 4))
    assert share_stderr(count, total) == pytest.approx(share_stderr(total - count, total))


def test_many_items_have_the_usual_error() -> None:
    assert share_stderr(3000, 10_000) == pytest.approx(math.sqrt(0.3 * 0.7 / 10_000), rel=1e-3)


def test_without_a_dense_model() -> None:
    result = choosing([passage(1)], [1], None)
    assert (result.accuracy, result.agreement, result.agreement_stderr) == (1.0, None, None)


def test_choices_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="items: got none"):
        choosing([], [], None)
    with pytest.raises(ValueError, match="dense_chosen: got 2 choices, allowed: 1"):
        choosing([passage(1)], [1], [1, 2])


def test_a_loss_is_noisy_only_where_the_choices_differ() -> None:
    dense = Choosing(0.75, 0.05, 1.0, 0.02, 64, 0.25)
    assert dense.loss(dense) == (0.0, 0.0)
    level = Choosing(0.5, 0.06, 0.625, 0.06, 64, 0.25)
    assert level.loss(dense) == pytest.approx((0.25, math.sqrt((0.375 - 0.0625) / 64)))
    alone = Choosing(0.5, 0.06, None, None, 64, 0.25)
    assert alone.loss(dense) == pytest.approx((0.25, math.hypot(0.05, 0.06)))
