"""Checkpoints that differ from a real one."""

from __future__ import annotations

import json
from pathlib import Path

from pruning.checkpoint import read_config


def copy_of(model: Path, directory: Path, **changes: object) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = {**read_config(model), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
