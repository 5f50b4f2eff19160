"""Spearman's rank correlation, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from server.report.rank_correlation import spearman


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([0.1, 0.2, 0.3], [1.0, 20.0, 300.0], 1.0),
        ([0.1, 0.2, 0.3], [3.0, 2.0, 1.0], -1.0),
        # The two that are equal have the rank 2.5.
        ([1, 2, 3, 4], [1, 2, 2, 4], 3 / math.sqrt(10)),
        # 1 - 6 * sum(d ** 2) / (n * (n ** 2 - 1)) with the differences 1, -1, 0.
        ([1, 2, 3], [2, 1, 3], 0.5),
    ],
)
def test_values(x: list[float], y: list[float], expected: float) -> None:
    assert spearman(x, y) == pytest.approx(expected)


def test_what_has_no_order_has_no_correlation() -> None:
    assert spearman([1.0], [2.0]) is None
    assert spearman([1.0, 1.0], [2.0, 3.0]) is None
    with pytest.raises(ValueError, match="got 1 values, allowed: 2"):
        spearman([1.0, 2.0], [2.0])
