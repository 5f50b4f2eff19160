from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.limit import StepTime, best_speedup, limits

TIME = st.floats(1e-4, 10.0)


def test_the_limit_of_the_paper_is_that_of_layers_alone() -> None:
    """With nothing but layers, 23 of 32 run 1.39 times as fast."""
    assert best_speedup(1.0, 23, 32) == pytest.approx(32 / 23)
    assert best_speedup(0.0, 1, 32) == 1.0
    assert best_speedup(0.5, 8, 16) == pytest.approx(4 / 3)


@given(TIME, TIME, st.sets(st.integers(1, 48), min_size=2))
def test_a_line_is_found_again(fixed: float, per_layer: float, depths: set[int]) -> None:
    seconds = {depth: fixed + per_layer * depth for depth in depths}
    line = StepTime.fit(seconds)
    assert line is not None
    share = line.layer_share(48)
    assert share == pytest.approx(48 * per_layer / (fixed + 48 * per_layer), rel=1e-5, abs=1e-6)


@given(TIME, TIME, st.integers(4, 48))
def test_what_costs_nothing_beside_its_layers_reaches_the_limit(
    fixed: float, per_layer: float, num_layers: int
) -> None:
    depths = {num_layers, num_layers // 2, 1}
    seconds = {depth: fixed + per_layer * depth for depth in depths}
    found = limits(seconds, num_layers)
    for depth in depths:
        assert found[depth] == pytest.approx(seconds[num_layers] / seconds[depth], rel=1e-5)


def test_a_slow_depth_does_not_lower_its_own_limit() -> None:
    seconds = {16: 1.0 + 16.0, 8: 1.0 + 8.0, 4: 1.0 + 4.0}
    slow = {**seconds, 8: 2 * seconds[8]}
    assert limits(slow, 16)[8] == pytest.approx(limits(seconds, 16)[8])


def test_no_limit_from_too_few_depths() -> None:
    assert limits({16: 1.0, 8: 0.5}, 16)[8] is None
    assert limits({16: 1.0}, 16) == {16: None}
    assert StepTime.fit({4: 1.0}) is None


@given(TIME, TIME)
def test_the_share_of_the_layers_is_a_share(first: float, second: float) -> None:
    """Also where noise makes fewer layers take longer."""
    line = StepTime.fit({1: first, 16: second})
    assert line is not None
    assert 0.0 <= line.layer_share(16) <= 1.0
