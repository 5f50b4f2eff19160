"""A fleet's replicas and depth, under loads whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest

from bench.fleet_simulation import (
    FleetOptions,
    MeasuredLevel,
    Outcome,
    Strategy,
    Trace,
    simulate,
)

DENSE, PRUNED = MeasuredLevel(16, 10.0, 1.0), MeasuredLevel(8, 20.0, 0.6)
OPTIONS = FleetOptions(
    replicas=10,
    streams=8,
    tokens_per_request=10.0,
    start_seconds=60,
    target_seconds=5.0,
    hold_seconds=10,
)


def steady(work_per_second: float, seconds: int) -> Trace:
    return Trace(np.arange(seconds, dtype=float), np.full(seconds, work_per_second))


def outcome(trace: Trace, *, scales: bool = False, changes_depth: bool = False) -> Outcome:
    strategy = Strategy("", scales=scales, changes_depth=changes_depth)
    return simulate(trace, [DENSE, PRUNED], strategy, OPTIONS)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("changes_depth", [False, True])
def test_a_load_that_the_replicas_carry_changes_nothing(scales: bool, changes_depth: bool) -> None:
    result = outcome(steady(70.0, 600), scales=scales, changes_depth=changes_depth)
    assert result.within_target == 1
    assert (result.mean_depth, result.mean_agreement) == (16, 1)
    assert result.replica_hours == pytest.approx(10 * 600 / 3600)
    assert result.most_replicas == 10


def test_a_queue_grows_by_what_is_not_done() -> None:
    """200 tokens come each second and 100 are done: the last request waits for half the time."""
    result = outcome(steady(200.0, 100))
    assert result.wait_p99 == pytest.approx(99.0 * 0.99, rel=0.02)
    assert result.within_target == pytest.approx(0.06, abs=0.02)
    assert result.replica_hours == pytest.approx(10 * 200 / 3600)


def test_depth_carries_at_once_what_it_can() -> None:
    result = outcome(steady(190.0, 600), changes_depth=True)
    assert result.within_target > 0.98
    assert result.mean_depth < 10
    assert result.mean_agreement < 0.7
    assert result.most_replicas == 10


def test_replicas_carry_more_than_depth_but_late() -> None:
    load = steady(300.0, 1800)
    replicas, depth = outcome(load, scales=True), outcome(load, changes_depth=True)
    assert replicas.most_replicas >= 30
    assert replicas.mean_depth == 16
    assert replicas.within_target > depth.within_target
    both = outcome(load, scales=True, changes_depth=True)
    assert both.within_target > replicas.within_target
    assert both.mean_agreement > depth.mean_agreement


def test_replicas_go_when_load_has_gone() -> None:
    load = Trace(np.arange(7200, dtype=float), np.r_[np.full(900, 300.0), np.full(6300, 10.0)])
    result = outcome(load, scales=True)
    assert result.replica_hours < 0.5 * result.most_replicas * 7200 / 3600


def test_nothing_can_be_said_of_nothing() -> None:
    with pytest.raises(ValueError, match="a trace needs requests"):
        simulate(Trace(np.array([]), np.array([])), [DENSE], Strategy("", False, False), OPTIONS)
