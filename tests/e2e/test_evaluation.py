"""``fathom eval`` with the real harness against a real server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import data_path
from tests.e2e.running_server import PATIENCE, RunningServer
from tests.fathom_command import environment, evaluation_program


def evaluated(
    server: RunningServer, directory: Path, *arguments: str, code: int = 0
) -> tuple[str, dict[str, object]]:
    """Return what the command prints, and its file."""
    output = directory / "results.json"
    result = subprocess.run(
        [
            evaluation_program("fathom"),
            "eval",
            "--data",
            data_path("mcq"),
            "--output",
            output,
            *arguments,
        ],
        env=environment(
            FATHOM_ADDRESS=server.address,
            HF_HOME=str(directory / "hf"),
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == code, result.stderr
    found = json.loads(output.read_text("utf-8")) if output.exists() else {}
    return result.stdout + result.stderr, found


@pytest.mark.parametrize("num_fewshot", ["0", "1"])
def test_accuracy_at_a_level_beside_that_of_the_dense_model(
    demo_server: RunningServer, tmp_path: Path, num_fewshot: str
) -> None:
    names = ["arc_easy", "piqa", "copa", "winogrande", "mmlu"]
    printed, found = evaluated(
        demo_server, tmp_path,
        "--level", "fast", "--tasks", ",".join(names), "--limit", "4",
        "--num-fewshot", num_fewshot,
    )  # fmt: skip
    tasks = found["tasks"]
    assert isinstance(tasks, dict)
    assert list(tasks) == names
    assert found["served"] == "8/8"
    for name, task in tasks.items():
        assert name in printed
        assert task["num_items"] == (40 if name == "mmlu" else 4)
        assert 0 <= task["acc"] <= 1
        assert task["acc_stderr"] >= 0
        assert task["dense"]["num_items"] == task["num_items"]
        if task["dense"]["acc"]:
            assert task["retention"] == task["acc"] / task["dense"]["acc"]
    if num_fewshot == "0":
        assert "acc at 8/8" in printed


def test_a_task_that_is_not_there(demo_server: RunningServer, tmp_path: Path) -> None:
    printed, _ = evaluated(demo_server, tmp_path, "--tasks", "nothing", code=2)
    assert "tasks: got 'nothing'" in " ".join(printed.replace("│", " ").split())
