from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lengths import Lengths

LENGTHS = st.sampled_from(
    ["16", "fixed:7", "uniform:4:64", "lognormal:100:0.7:512", "list:1,2,300", "lognormal:5:0:5"]
)


def test_each_kind() -> None:
    assert Lengths.parse("16") == Lengths.parse("fixed:16")
    assert Lengths.parse("16").draw(3, seed=0) == [16, 16, 16]
    assert Lengths.parse("list:1,2,300").draw(5, seed=0) == [1, 2, 300, 1, 2]
    assert set(Lengths.parse("uniform:4:6").draw(200, seed=0)) == {4, 5, 6}
    drawn = Lengths.parse("lognormal:100:0.7:512").draw(4000, seed=0)
    assert statistics.median(drawn) == pytest.approx(100, rel=0.05)
    assert max(drawn) == 512


@given(LENGTHS, st.integers(0, 100), st.integers(0, 2**31))
def test_lengths_are_repeatable_and_within_bounds(text: str, count: int, seed: int) -> None:
    lengths = Lengths.parse(text)
    drawn = lengths.draw(count, seed)
    assert drawn == lengths.draw(count, seed)
    assert len(drawn) == count
    assert all(1 <= length <= lengths.longest for length in drawn)
    assert Lengths.parse(str(lengths)) == lengths


@pytest.mark.parametrize(
    "text",
    [
        "",
        "many",
        "0",
        "-3",
        "1.5",
        "nan",
        "uniform:8",
        "uniform:8:4",
        "uniform:0:4",
        "lognormal:100:0.5",
        "lognormal:100:-1:200",
        "lognormal:300:1:200",
        "list:",
        "list:4,0",
        "normal:3:4",
        "1000000000000",
        "inf",
    ],
)
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: 16, fixed:16, uniform"):
        Lengths.parse(text)
