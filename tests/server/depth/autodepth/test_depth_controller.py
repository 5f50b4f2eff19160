"""When depth goes down, and when up again."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from server.depth.depth_controller import DepthController, Load, Targets
from server.depth.sliding_window import SlidingWindow

TARGETS = Targets(time_to_first_token=1.0, inter_token_latency=0.1)
SPEEDUPS = (1.0, 1.25, 2.0, 4.0)
# The rung above would be, too; but the engine is far from idle.
COMFORTABLE = Load(0.1, 0.05, 0.5)
CALM = Load(0.01, 0.001, 0.1)
SLOW_FIRST = Load(1.1, 0.01, 1.0)
SLOW_STEPS = Load(0.1, 0.11, 0.3)

loads = st.builds(
    Load,
    st.floats(0, 10, allow_subnormal=False),
    st.floats(0, 1, allow_subnormal=False),
    st.floats(0, 1.5, allow_subnormal=False),
    st.floats(1, 5, allow_subnormal=False),
)


def run(
    controller: DepthController, load: Load, seconds: float, start: float = 0.0
) -> list[tuple[float, int]]:
    """Return the changes while the load stays as it is."""
    changes, rung = [], controller.rung
    for i in range(int(seconds * 2)):
        now = start + i / 2
        if controller.update(now, load, SPEEDUPS) != rung:
            rung = controller.rung
            changes.append((now, rung))
    return changes


def test_either_latency_turns_depth_down_within_seconds() -> None:
    for load in (SLOW_FIRST, SLOW_STEPS):
        changes = run(DepthController(TARGETS, 30.0), load, 60)
        assert changes == [(0.0, 1), (2.0, 2), (4.0, 3)]


def test_it_goes_down_as_far_as_it_takes_to_keep_up() -> None:
    for overload, rung in ((1.0, 1), (1.2, 1), (1.3, 2), (2.0, 2), (2.5, 3), (9.0, 3)):
        controller = DepthController(TARGETS, 30.0)
        assert controller.update(0.0, Load(1.1, 0.01, 1.0, overload), SPEEDUPS) == rung
    # From there on, what more there comes than starts counts.
    controller = DepthController(TARGETS, 30.0)
    controller.update(0.0, SLOW_FIRST, SPEEDUPS)
    assert controller.update(9.0, Load(1.1, 0.01, 1.0, 1.5), SPEEDUPS) == 2


def test_it_comes_back_slowly_and_all_the_way() -> None:
    controller = DepthController(TARGETS, 30.0)
    run(controller, SLOW_FIRST, 10)
    changes = run(controller, CALM, 200, start=10.0)
    assert [rung for _, rung in changes] == [2, 1, 0]
    assert all(b[0] - a[0] >= 30 for a, b in zip([(10.0, 3), *changes], changes, strict=False))
    assert changes[-1][0] < 10 + 3 * 31


def test_it_does_not_rise_where_the_rung_above_would_be_too_slow() -> None:
    controller = DepthController(TARGETS, 30.0)
    run(controller, SLOW_FIRST, 1)
    # The target is 0.1 s between tokens; 0.07 s would be 0.0875 s on the rung above.
    assert run(controller, Load(0.1, 0.07, 0.5), 1000, start=1.0) == []
    assert run(controller, Load(0.1, 0.06, 0.5), 40, start=1001.0) == [(1031.0, 0)]


def test_a_full_batch_is_no_time_to_rise() -> None:
    controller = DepthController(TARGETS, 30.0)
    run(controller, SLOW_FIRST, 1)
    assert run(controller, Load(0.1, 0.01, 0.9), 1000, start=1.0) == []


def test_mistaken_rises_become_rare() -> None:
    """A load that the deeper rung never holds, and the shallower one always does."""
    controller = DepthController(TARGETS, 30.0)
    rises = []
    for i in range(2 * 24 * 3600):
        load = SLOW_FIRST if controller.rung == 0 else COMFORTABLE
        before = controller.rung
        if controller.update(i / 2, load, SPEEDUPS[:2]) < before:
            rises.append(i / 2)
    assert len(rises) < 30 + 24
    gaps = [b - a for a, b in itertools.pairwise(rises)]
    assert gaps == sorted(gaps)
    # Once there is no load, the controller forgets what it has learned of it.
    day = 24 * 3600.0
    assert controller.rung == 1
    changes = run(controller, CALM, 100, start=day)
    assert [rung for _, rung in changes] == [0]
    assert changes[0][0] - day < 35


def test_a_rush_long_after_a_rise_is_no_mistake() -> None:
    controller = DepthController(TARGETS, 30.0)
    now = 0.0
    for _ in range(5):
        (down,) = run(controller, SLOW_FIRST, 2, start=now)
        (up,) = run(controller, COMFORTABLE, 160, start=now + 2)
        assert (down[1], up[1]) == (1, 0)
        assert up[0] - down[0] < 35
        now += 162


@given(st.lists(st.tuples(loads, st.integers(1, 4)), min_size=1, max_size=200))
def test_the_rung_exists_and_rises_one_at_a_time(steps: list[tuple[Load, int]]) -> None:
    controller = DepthController(TARGETS, 30.0)
    now, before, last_change = 0.0, 0, -math.inf
    for load, num_rungs in steps:
        now += 0.5
        rung = controller.update(now, load, SPEEDUPS[:num_rungs])
        assert 0 <= rung < num_rungs
        before = min(before, num_rungs - 1)  # a rung that is gone
        assert rung >= before - 1
        if rung != before:
            assert now - last_change >= (2.0 if rung > before else 30.0)
            last_change = now
        before = rung


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 100), st.integers(1, 9)), max_size=50))
def test_a_window_is_the_mean_of_what_is_in_it(entries: list[tuple[float, float, int]]) -> None:
    window = SlidingWindow(3.0)
    now, seen = 0.0, []
    for gap, value, count in entries:
        now += gap
        window.add(now, value, count)
        seen.append((now, value, count))
    for later in (0.0, 1.0, 10.0):
        # Whole quarters of a second are forgotten at once.
        inside = [s for s in seen if s[0] - s[0] % 0.25 > now + later - 3.0]
        total = sum(count for _, _, count in inside)
        expected = sum(value for _, value, _ in inside) / total if total else 0.0
        assert math.isclose(window.mean(now + later), expected, abs_tol=1e-9)
