from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import Percentiles, Spread, paired_difference, paired_ratio

POSITIVE = st.floats(0.01, 1e6)


def test_percentiles_of_a_hundred_steps() -> None:
    assert Percentiles.of([float(n) for n in range(101)]) == Percentiles(50.0, 95.0, 99.0)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert Percentiles.of([]) is None


@given(st.lists(POSITIVE, min_size=1))
def test_percentiles_are_ordered_and_within_the_values(values: list[float]) -> None:
    found = Percentiles.of(values)
    assert found is not None
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.p50 <= found.p95 + slack <= found.p99 + 2 * slack
    assert found.p99 <= max(values) + slack


def test_ratios_are_of_pairs() -> None:
    """The machine ran at half its pace in the second round: the ratio does not see it."""
    assert paired_ratio([8.0, 4.0, 8.0], [4.0, 2.0, 4.0]) == Spread(2.0, 2.0, 2.0)
    assert paired_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == Spread(2.0, 1.0, 9.0)
    assert paired_difference([3.0, 5.0], [1.0, 1.0]) == Spread(3.0, 2.0, 4.0)


@given(st.lists(st.tuples(POSITIVE, st.floats(0.1, 10)), min_size=1), st.floats(0.1, 10))
def test_a_constant_factor_between_pairs_is_found(
    paced: list[tuple[float, float]], factor: float
) -> None:
    """Whatever the pace of each round."""
    other = [speed * pace for speed, pace in paced]
    spread = paired_ratio([factor * speed for speed in other], other)
    assert spread.low == pytest.approx(factor)
    assert spread.high == pytest.approx(factor)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])
