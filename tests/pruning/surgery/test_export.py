from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pruning.plan import Plan
from pruning.surgery import PLAN_FILE, export_checkpoint
from pruning.surgery.shard import Shard
from tests.pruning.models import generate, load, without_layers
from tests.pruning.surgery.exporting import (
    INDEX,
    export,
    large_model,
    plan_of,
    read,
    tensors,
)


def test_real_model_at_every_depth(stories_model: Path, tmp_path: Path) -> None:
    plan = plan_of(stories_model, (2, 3, 1, 4, 0))
    for depth in range(1, 6):
        out = tmp_path / str(depth)
        export_checkpoint(stories_model, out, plan, depth)
        expected = without_layers(load(stories_model), "model.layers", plan.skipped(depth))
        assert generate(load(out)) == generate(expected)


@pytest.mark.parametrize("removed", [(), (1,), (2,), (0, 3), (1, 2, 3)])
def test_every_tensor_is_the_old_one(model: Path, tmp_path: Path, removed: tuple[int, ...]) -> None:
    out = export(model, tmp_path / "out", removed)
    kept = [layer for layer in range(4) if layer not in removed]
    old, new = tensors(model), tensors(out)
    expected = {
        re.sub(r"layers\.(\d)", lambda m: f"layers.{kept.index(int(m[1]))}", name): tensor
        for name, tensor in old.items()
        if not any(f"layers.{layer}." in name for layer in removed)
    }
    assert new.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape)
        assert (
            new[name]
            .view(torch.uint8 if tensor.ndim else tensor.dtype)
            .equal(tensor.view(torch.uint8 if tensor.ndim else tensor.dtype))
        )


def test_shards_stay_shards(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (2,))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    index = read(out / INDEX)
    shards = {name: Shard.read(out / name) for name in files}
    assert index["weight_map"] == {t.name: f for f, shard in shards.items() for t in shard.tensors}
    size = sum(t.end - t.start for shard in shards.values() for t in shard.tensors)
    assert index["metadata"] == {"total_size": size}
    assert {json.dumps(shard.metadata) for shard in shards.values()} == {'{"format": "pt"}'}


def test_real_model_in_shards(stories_model: Path, tmp_path: Path) -> None:
    load(stories_model).save_pretrained(tmp_path / "model", max_shard_size="200KB")
    out = export(tmp_path / "model", tmp_path / "out", (1, 2))
    assert len(list(out.glob("*.safetensors"))) > 3
    assert generate(load(out)) == generate(load(export(stories_model, tmp_path / "one", (1, 2))))


def test_what_lies_beside_the_weights(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,), base_model="somebody/model")
    copied = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE"}
    copied |= {"generation_config.json", "additional_chat_templates/tools.jinja"}
    for name in copied:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    written = {"config.json", "quantize_config.json", "README.md", PLAN_FILE, INDEX}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".safetensors")} == copied | written
    config = read(out / "config.json")
    assert "auto_map" not in config
    assert config["quantization_config"] == {"bits": 4, "dynamic": {r"-:.*\.layers\.2\..*": {}}}
    assert read(out / "quantize_config.json") == {"dynamic": {r"-:.*\.layers\.1\..*": {}}}
    assert Plan.load(out / PLAN_FILE) == plan_of(model, (1,))
    _, metadata, card = (out / "README.md").read_text().split("---\n", 2)
    for line in ("base_model: somebody/model", "license: apache-2.0", "depth: 3", "- en"):
        assert line in metadata.splitlines()
    assert "removed_layers:\n- 1\n" in metadata
    assert "| 1 | 0.250000 | 0.500000 | removed |\n| 2 | 0.250000 | 0.500000 | 1 |" in card
    assert "arxiv.org/abs/2403.03853" in card
    assert "Old card" not in card


def test_code_is_copied_where_it_is_trusted(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "out", (1,), with_code=True)
    assert (out / "modeling.py").read_text() == "modeling.py"
    assert read(out / "config.json")["auto_map"] == {"AutoModel": "modeling.Model"}


def test_weights_in_another_layout_are_left_out(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"layers.0.w": torch.zeros(4)}, model / "consolidated.safetensors")
    out = export(model, tmp_path / "out", (1,))
    assert "layers.0.w" not in tensors(out)
    assert "consolidated.safetensors: left out" in caplog.text


MEASURED_EXPORT = """
import re, sys
from pathlib import Path
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
small, large, out, small_plan, large_plan = sys.argv[1:]
export_checkpoint(small, out + "-small", Plan.load(small_plan), 3)
before = peak()
written = export_checkpoint(large, out, Plan.load(large_plan), 1)
print(written.num_bytes, peak(), peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """One tensor of 400 MiB is copied: more than the limit, so that it cannot be held."""
    arguments: list[str | Path] = [sys.executable, "-c", MEASURED_EXPORT]
    models = [large_model(tmp_path / "small", 1), large_model(tmp_path / "large", 400 << 20)]
    plans = []
    for model in models:
        plans.append(tmp_path / f"{model.name}.json")
        plan_of(model).save(plans[-1])
    result = subprocess.run(
        [*arguments, *models, tmp_path / "out", *plans], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    num_bytes, peak, growth = map(int, result.stdout.split())
    assert num_bytes > 400 << 20
    assert growth < 50 << 20
    assert peak < 1 << 30
    (tmp_path / "out" / "model.safetensors").unlink()  # pytest keeps the directory


def test_surgery_needs_no_torch() -> None:
    code = (
        "import sys, pruning.surgery\n"
        "heavy = {'vllm', 'grpc', 'server', 'torch', 'transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
