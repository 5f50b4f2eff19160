"""Configurations of tasks whose questions are in local files."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import InvalidArgument
from server.evaluation.local_tasks import local_tasks, task_names


def test_the_tasks_that_come_with_the_server() -> None:
    assert task_names() == ["arc_easy", "boolq", "copa", "mmlu", "piqa", "winogrande"]


def test_files_are_below_the_directory_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "copa.jsonl").touch()
    ((config,),) = local_tasks(["copa"], tmp_path).values()
    assert config["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "copa.jsonl")}}
    assert "data_files" not in config


def test_every_subject_is_a_task_with_examples_of_its_own(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject in ("anatomy", "astronomy"):
            (tmp_path / "mmlu" / split / f"{subject}_{split}.csv").touch()
    (configs,) = local_tasks(["mmlu"], tmp_path).values()
    assert [config["task"] for config in configs] == ["mmlu_anatomy", "mmlu_astronomy"]
    files = configs[1]["dataset_kwargs"]["data_files"]
    assert files["dev"].endswith("dev/astronomy_dev.csv")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").touch()
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\ndata_files: {test: mine.jsonl}\ndataset_path: json\n")
    ((config,),) = local_tasks([str(task)], tmp_path).values()
    assert config["task"] == "mine"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("arc", "tasks: got 'arc', allowed: arc_easy"),
        ("absent.yaml", "or the path of a YAML file"),
        ("piqa", "a directory with piqa.jsonl"),
        ("mmlu", "a directory with mmlu/test"),
    ],
)
def test_what_is_not_there(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        local_tasks([name], tmp_path)
