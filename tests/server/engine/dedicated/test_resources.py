"""Resources of the machine, divided among the engines of the levels."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.arguments import GIB
from server.engine.dedicated.resources import cpu_resources, divide_memory
from server.errors import FailedPrecondition

NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(NAMES)
def test_levels_that_are_not_named_have_equal_parts(names: list[str]) -> None:
    assert divide_memory(names, {}) == {name: 1 / len(names) for name in names}


@given(NAMES, st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 0.12)))
def test_shares_are_kept_and_never_more_than_all(names: list[str], given: dict[str, float]) -> None:
    divided = divide_memory(names, given)
    assert list(divided) == names
    assert all(divided[name] == share for name, share in given.items() if name in names)
    rest = {divided[name] for name in names if name not in given}
    assert len(rest) <= 1
    assert sum(divided.values()) <= 1 + 1e-9
    if rest:
        assert sum(divided.values()) == pytest.approx(1)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="leaves nothing for the level c"):
        divide_memory(["a", "b", "c"], {"a": 0.5, "b": 0.5})


def test_small_models_have_one_thread_and_their_part_of_the_cache(stories_model: Path) -> None:
    resources = cpu_resources(stories_model, 0.25, GIB, num_cores=8, num_levels=2)
    assert (resources.kv_cache_bytes, resources.num_threads) == (GIB // 4, 1)


def test_cores_are_divided(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(128 << 20)
    threads = [
        cpu_resources(tmp_path, 0.1, GIB, num_cores=8, num_levels=levels).num_threads
        for levels in (1, 2, 3, 20)
    ]
    assert threads == [8, 4, 2, 1]


def test_more_than_the_memory_is_refused(stories_model: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"needs about .* GiB .* are available; remove a"):
        cpu_resources(stories_model, 1.0, 1 << 60, num_cores=1, num_levels=1)
