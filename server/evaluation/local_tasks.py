"""Tasks whose questions are in files of this machine, so that they run with no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from server.errors import InvalidArgument

_TASKS = Path(__file__).parent / "tasks"
# A task of several files, each a task of its own.
_SUBJECTS = "mmlu"


def task_names() -> list[str]:
    """Return the tasks that come with the server."""
    return sorted(path.stem for path in _TASKS.glob("*.yaml"))


def local_tasks(names: list[str], data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the configurations of the tasks for the harness, by the names asked for.

    A name is one of :func:`task_names`, or the path of a YAML file of the same form; its key
    ``data_files`` has paths below ``data``. Raises :class:`InvalidArgument` for what is not there.
    """
    return {name: _configurations(name, data) for name in names}


def _configurations(name: str, data: Path) -> list[dict[str, Any]]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else _TASKS / f"{name}.yaml"
    if not path.is_file():
        allowed = f"{', '.join(task_names())}, or the path of a YAML file"
        raise InvalidArgument("tasks", name, allowed)
    config = yaml.safe_load(path.read_text("utf-8"))
    files: dict[str, str] = config.pop("data_files")
    if name != _SUBJECTS:
        return [_with_files(config, config["task"], files, data)]
    before, after = (data / files["test"]).name.split("*")
    subjects = sorted(
        file.name.removeprefix(before).removesuffix(after) for file in data.glob(files["test"])
    )
    if not subjects:
        raise InvalidArgument("data", str(data), f"a directory with {files['test']}")
    return [
        _with_files(
            config,
            f"{name}_{subject}",
            {split: file.replace("*", subject) for split, file in files.items()},
            data,
        )
        for subject in subjects
    ]


def _with_files(
    config: dict[str, Any], task: str, files: dict[str, str], data: Path
) -> dict[str, Any]:
    paths = {split: data / file for split, file in files.items()}
    for path in paths.values():
        if not path.is_file():
            raise InvalidArgument("data", str(data), f"a directory with {path.relative_to(data)}")
    return {
        **config,
        "task": task,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in paths.items()}},
    }
