"""Exports of small checkpoints, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pruning.checkpoint import check_checkpoint
from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan
from pruning.surgery import count_layers, export_checkpoint

INDEX = "model.safetensors.index.json"


def plan_of(model: Path, removed: tuple[int, ...] = (), num_layers: int | None = None) -> Plan:
    """A plan that removes ``removed`` first and the other layers from the last."""
    num_layers = num_layers or count_layers(model)
    others = [layer for layer in reversed(range(num_layers)) if layer not in removed]
    return Plan(
        removal_order=(*removed, *others),
        scores=tuple(0.25 for _ in range(num_layers)),
        stderrs=(0.5,) * num_layers,
        model_fingerprint=model_fingerprint(model),
        text_fingerprint="sha256:0",
        num_tokens=7,
        versions={"package": "1.0"},
        created_at=0.0,
    )


def export(model: Path, out: Path, removed: tuple[int, ...], **options: Any) -> Path:
    num_layers = count_layers(model)
    written = export_checkpoint(
        model, out, plan_of(model, removed), num_layers - len(removed), **options
    )
    assert (written.directory, written.removed) == (out, tuple(sorted(removed)))
    check_checkpoint(out)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f"{out.name}*"))


def made_up(directory: Path, content: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 4}')
    save_file(content, directory / "model.safetensors", {"format": "pt"})
    return directory


def large_model(directory: Path, layer_bytes: int, num_layers: int = 4) -> Path:
    """A checkpoint of one file that takes no room on the disk: a hole after the header."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": num_layers}))
    header = {
        f"model.layers.{i}.w": {
            "dtype": "U8",
            "shape": [layer_bytes],
            "data_offsets": [i * layer_bytes, (i + 1) * layer_bytes],
        }
        for i in range(num_layers)
    }
    head = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + num_layers * layer_bytes)
    return directory
