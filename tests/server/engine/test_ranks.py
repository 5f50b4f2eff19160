"""The cores that each rank is bound to."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.ranks import CoreBinding, Ranks
from server.errors import InvalidArgument

VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is restored
    monkeypatch.delenv(VARIABLE)


@given(
    cores=st.lists(st.integers(0, 500), min_size=1, max_size=64, unique=True).map(sorted),
    tensor=st.integers(1, 6),
    pipeline=st.integers(1, 4),
)
def test_ranks_get_equal_parts_that_are_apart(cores: list[int], tensor: int, pipeline: int) -> None:
    os.environ.pop(VARIABLE, None)
    ranks = Ranks(tensor, pipeline)
    if ranks.number > len(cores):
        with pytest.raises(InvalidArgument, match=f"at most {len(cores)} processes in all"):
            CoreBinding().choose(ranks, cores)
        return
    CoreBinding().choose(ranks, cores)
    parts = [[int(core) for core in part.split(",")] for part in os.environ[VARIABLE].split("|")]
    assert len(parts) == ranks.number
    assert {len(part) for part in parts} == {len(cores) // ranks.number}
    together = [core for part in parts for core in part]
    assert together == cores[: len(together)]


def test_the_operators_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0-3|8-11")
    CoreBinding().choose(Ranks(2), [0, 1])
    CoreBinding().choose(Ranks(64), [0, 1])
    assert os.environ[VARIABLE] == "0-3|8-11"


def test_an_own_choice_is_made_again_for_the_next_engine() -> None:
    binding = CoreBinding()
    binding.choose(Ranks(2), [4, 5, 6, 7])
    assert os.environ[VARIABLE] == "4,5|6,7"
    binding.choose(Ranks(4), [4, 5, 6, 7])
    assert os.environ[VARIABLE] == "4|5|6|7"


@pytest.mark.parametrize(
    ("ranks", "reason", "setting"),
    [
        (
            Ranks(3),
            "Total number of attention heads (4) must be divisible by tensor parallel size (3).",
            ("tensor_parallel_size", 3),
        ),
        (
            Ranks(1, 2),
            "Pipeline parallelism: pipeline parallel is not supported",
            ("pipeline_parallel_size", 2),
        ),
        (
            Ranks(2, 1, "ray"),
            "Failed to import Ray: No module named 'ray'",
            ("distributed_executor_backend", "ray"),
        ),
        (Ranks(), "tensor parallel size", None),
        (Ranks(2), "something else in an array", None),
    ],
)
def test_the_setting_that_vllm_refuses(
    ranks: Ranks, reason: str, setting: tuple[str, int | str] | None
) -> None:
    assert ranks.refused_setting(reason) == setting
