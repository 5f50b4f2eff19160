"""Levels: defaults and notation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.depth.levels import Level, LevelSpec, check_levels, default_levels
from server.errors import InvalidArgument


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (16, [("dense", 16), ("balanced", 12), ("fast", 8), ("turbo", 4)]),
        (5, [("dense", 5), ("balanced", 3), ("fast", 2), ("turbo", 1)]),
        (3, [("dense", 3), ("balanced", 2), ("fast", 1)]),
        (2, [("dense", 2), ("balanced", 1)]),
        (1, [("dense", 1)]),
    ],
)
def test_default_levels(num_layers: int, expected: list[tuple[str, int]]) -> None:
    assert default_levels(num_layers) == tuple(Level(name, d, d) for name, d in expected)


@given(st.integers(1, 200))
def test_default_levels_are_distinct_depths_of_the_model(num_layers: int) -> None:
    depths = [level.decode_layers for level in default_levels(num_layers)]
    assert depths[0] == num_layers
    assert depths == sorted(set(depths), reverse=True)
    assert depths[-1] >= 1


def test_an_int_is_layers_and_a_float_a_prune_ratio() -> None:
    assert LevelSpec("a", 1).resolve(16) == Level("a", 1, 1)
    assert LevelSpec("a", 0.25).resolve(16) == Level("a", 12, 12)
    assert LevelSpec("a", 0.0).resolve(16) == Level("a", 16, 16)
    assert LevelSpec("a", 16, 0.5).resolve(16) == Level("a", 8, 16)


@pytest.mark.parametrize(
    ("spec", "field", "shown"),
    [
        (LevelSpec("fast", 0), "levels.fast.depth", "got 0, allowed: 1 to 16"),
        (LevelSpec("fast", 17), "levels.fast.depth", "got 17, allowed: 1 to 16"),
        (LevelSpec("fast", -1), "levels.fast.depth", "got -1, allowed: 1 to 16"),
        (LevelSpec("fast", 1.0), "levels.fast.depth", "got 1.0, allowed: 0 or more and less"),
        (LevelSpec("fast", math.nan), "levels.fast.depth", "got nan, allowed: 0 or more"),
        (LevelSpec("fast", 8, 17), "levels.fast.prefill_depth", "got 17, allowed: 1 to 16"),
        (LevelSpec("fast lane", 8), "levels.fast lane.name", "got 'fast lane', allowed: a name"),
        (LevelSpec("", 8), "levels..name", "got '', allowed: a name"),
    ],
)
def test_levels_that_the_model_cannot_have(spec: LevelSpec, field: str, shown: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spec.resolve(16)
    assert caught.value.field == field
    assert shown in str(caught.value)


def test_errors_can_name_another_field() -> None:
    with pytest.raises(InvalidArgument, match=r"^levels\[3\]\.depth: got 17, allowed: 1 to 16$"):
        LevelSpec("fast", 17).resolve(16, "levels[3]")


def test_names_are_used_once_and_there_is_at_least_one() -> None:
    with pytest.raises(InvalidArgument, match="at least one level"):
        check_levels([])
    with pytest.raises(InvalidArgument, match=r"levels\[1\]\.name: got 'a'"):
        check_levels([Level("a", 1, 1), Level("a", 2, 2)])
