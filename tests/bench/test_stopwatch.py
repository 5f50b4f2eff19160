from __future__ import annotations

import pytest

from bench.stopwatch import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_piece_does_not_count_the_pieces_within_it() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def work(seconds: float) -> None:
        clock.now += seconds

    inner = stopwatch.timed("inner", work)

    def outer_work() -> str:
        work(1.0)
        inner(2.0)
        inner(3.0)
        work(4.0)
        return "done"

    assert stopwatch.timed("outer", outer_work)() == "done"
    assert stopwatch.totals() == {"inner": [2, 5.0], "outer": [1, 5.0]}
    stopwatch.reset()
    assert stopwatch.totals() == {}


def test_pieces_of_one_name_within_each_other_count_once() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def count_down(n: int) -> None:
        clock.now += 1.0
        if n:
            timed(n - 1)

    timed = stopwatch.timed("piece", count_down)
    timed(3)
    assert stopwatch.totals() == {"piece": [4, 4.0]}


def test_a_piece_that_fails_is_counted() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def fail() -> None:
        clock.now += 2.0
        raise KeyError("x")

    with pytest.raises(KeyError):
        stopwatch.timed("piece", fail)()
    assert stopwatch.totals() == {"piece": [1, 2.0]}
