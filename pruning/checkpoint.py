"""Checks that a directory holds a whole model: configuration, weights, all shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pruning.checkpoint_file import CheckpointError, read_object
from pruning.tensor_header import read_header, tensor_names
from pruning.weights import weight_files

__all__ = [
    "CheckpointError",
    "check_checkpoint",
    "read_config",
    "tensor_names",
    "weight_files",
]


def check_checkpoint(directory: str | Path) -> None:
    """Raise :class:`CheckpointError`, naming the file, unless ``directory`` holds a whole model.

    It must hold a ``config.json``, at least one safetensors file that is loaded, and every shard
    that the index names, each as long as its header says. Only headers are read, not weights.
    Files that are not loaded are not checked.
    """
    directory = Path(directory)
    read_config(directory)
    for path in weight_files(directory):
        read_header(path)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory, allowed: a model directory")
    path = directory / "config.json"
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: missing; a model directory holds a config.json")
    return read_object(path)
