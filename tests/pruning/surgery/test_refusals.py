from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pruning.checkpoint import CheckpointError
from pruning.plan import PlanError
from pruning.surgery import PLAN_FILE, SurgeryError, check_output, count_layers, export_checkpoint
from tests.pruning.surgery.exporting import INDEX, export, plan_of, siblings


def refused(model: Path, out: Path, error: type[Exception], message: str, **options: Any) -> None:
    existed = out.exists()
    with pytest.raises(error, match=re.escape(message)):
        export_checkpoint(model, out, options.pop("plan", plan_of(model)), 3, **options)
    assert siblings(out) == ([out.name] if existed else [])


def test_plan_of_another_model(model: Path, stories_model: Path, tmp_path: Path) -> None:
    plan = plan_of(stories_model)
    refused(model, tmp_path / "out", PlanError, "removal_order: the plan is of a model", plan=plan)
    plan = plan_of(model)
    (model / "model-00002-of-00003.safetensors").write_bytes(
        (model / "model-00002-of-00003.safetensors").read_bytes()[:-1] + b"?"
    )
    refused(model, tmp_path / "out", PlanError, "model_fingerprint: the plan is of", plan=plan)


def test_depth_that_the_model_does_not_have(model: Path, tmp_path: Path) -> None:
    for depth in (0, 5):
        with pytest.raises(ValueError, match=f"^depth: got {depth}, allowed: 1 to 4$"):
            export_checkpoint(model, tmp_path / "out", plan_of(model), depth)


def test_damaged_source(model: Path, tmp_path: Path) -> None:
    plan, out = plan_of(model), tmp_path / "out"
    shard = model / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    refused(model, out, CheckpointError, f"{shard}: truncated: {len(data) - 3} bytes", plan=plan)
    shard.unlink()
    refused(model, out, CheckpointError, f"{shard}: missing, though {INDEX}", plan=plan)
    save_file({"model.layers.3.other": torch.zeros(1)}, shard)
    plan = plan_of(model)
    refused(model, out, CheckpointError, "model.layers.3.mlp.bias: no shard has it", plan=plan)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, out, CheckpointError, "holds no weights, allowed:", plan=plan)


def test_disk_that_is_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(model, tmp_path / "out", SurgeryError, "bytes (0.0 GiB), but 1000 bytes (0.0 GiB) are")


def test_directory_that_exists(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,))
    refused(model, out, SurgeryError, f"{out}: exists, allowed: a new directory")
    assert count_layers(out) == 3
    export(model, out, (1, 2), overwrite=True)
    assert count_layers(out) == 2
    assert siblings(out) == ["out"]
    refused(model, model, SurgeryError, f"{model}: exists and holds no {PLAN_FILE}", overwrite=True)
    shutil.copy(out / PLAN_FILE, model)
    refused(model, model, SurgeryError, f"{model}: holds the model itself", overwrite=True)
    absent = tmp_path / "absent" / "out"
    refused(model, absent, SurgeryError, f"{absent}: no directory {absent.parent}, allowed:")
    file = tmp_path / "file"
    file.touch()
    refused(model, file, SurgeryError, f"{file}: exists and holds no", overwrite=True)
    with pytest.raises(SurgeryError, match="exists, allowed: a new directory"):
        check_output(out)
    check_output(out, overwrite=True)
