"""How tests are divided among processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_xdist_auto_num_workers


def num_workers(*arguments: str) -> int:
    config: Any = SimpleNamespace(args=list(arguments))
    return pytest_xdist_auto_num_workers(config)


@pytest.mark.parametrize("argument", ["tests/test_state.py", "tests/test_state.py::test_one"])
def test_a_single_file_runs_in_this_process(argument: str) -> None:
    assert num_workers(argument) == 0


def test_more_have_a_worker_more_than_processors_if_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr("tests.conftest.WORKER_BYTES", 1)
    assert num_workers("tests") == 4
    assert num_workers("tests/a.py", "tests/b.py") == 4
    monkeypatch.setattr("tests.conftest.WORKER_BYTES", 1 << 60)
    assert num_workers("tests") == 0
