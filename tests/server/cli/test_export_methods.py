"""``fathom export --method``: what stands in for the removed layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pruning.plan import Plan
from pruning.surgery import PLAN_FILE
from tests.architectures import ARCHITECTURES, make_checkpoint
from tests.fathom_command import fathom_in_process
from tests.pruning.surgery.conftest import one_thread
from tests.server.cli.test_export import refusal
from tests.server.cli.test_export_repair import arguments, plan_file
from tests.server.engine.elastic import reference

__all__ = ["arguments", "one_thread", "plan_file"]

PERPLEXITY = re.compile(
    r"Perplexity: ([\d.]+), without (?:repair|the merges) ([\d.]+), with all layers ([\d.]+); .*"
)


def export(*arguments: str | Path) -> list[str]:
    result = fathom_in_process("export", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def perplexities(line: str) -> tuple[float, float, float]:
    found = PERPLEXITY.fullmatch(line)
    assert found is not None, line
    changed, plain, dense = map(float, found.groups())
    return changed, plain, dense


def test_linear_patch(
    arguments: list[str | Path], plan_file: Path, stories_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common: list[str | Path] = ["--plan", plan_file, "--depth", "3"]
    lines = export(*arguments, *common, "--method", "linear-patch", out)
    assert lines[:2] == [
        "Depth 3 of 5; layers removed: 2, 3",
        "Repair folded into the MLPs of the layers: 1",
    ]
    changed, plain, dense = perplexities(lines[2])
    assert dense < changed < plain
    name = "model.layers.1.mlp.down_proj.weight"
    original = load_file(stories_model / "model.safetensors")[name]
    assert not original.equal(load_file(out / "model.safetensors")[name])
    assert len(reference.generate(reference.load(out), [1, 2, 3], 8)) == 8
    export(*arguments, *common, tmp_path / "plain")
    export(*arguments, *common, "--method", "skip", tmp_path / "skip")
    for file in ("model.safetensors", "README.md"):
        written = [(tmp_path / kind / file).read_bytes() for kind in ("plain", "skip")]
        assert written[0] == written[1]


def test_laco(arguments: list[str | Path], plan_file: Path, tmp_path: Path) -> None:
    """It chooses the layers, so the plan that is given only says how much each matters."""
    out = tmp_path / "out"
    lines = export(*arguments, "--plan", plan_file, "--depth", "3", "--method", "laco", out)
    removed = Plan.load(out / PLAN_FILE).skipped(3)
    assert lines[0] == f"Depth 3 of 5; layers removed: {', '.join(map(str, removed))}"
    assert lines[1].startswith("Layers merged: ")
    taken = re.findall(r"(\d+(?:, \d+)*) into \d+", lines[1])
    assert sorted(int(layer) for part in taken for layer in part.split(", ")) == list(removed)
    assert lines[2].startswith("Similarity to the dense model's last states: 0.")
    changed, plain, dense = perplexities(lines[3])
    assert dense < min(changed, plain)
    assert f"held-out text: {changed:.2f}; {plain:.2f} without the" in (
        out / "README.md"
    ).read_text().replace("\n", " ")
    assert len(reference.generate(reference.load(out), [1, 2, 3], 8)) == 8


def test_what_a_method_cannot_do_is_refused(
    arguments: list[str | Path], plan_file: Path, small_quantized: Path, tmp_path: Path
) -> None:
    common: list[str | Path] = ["--depth", "2", tmp_path / "out"]
    for words, problem in (
        (("--method", "slice"), "--method: got 'slice', allowed: skip, linear-patch, laco"),
        (("--method", "laco", "--repair", "folded"), "--repair folded exclude each other"),
        (("--method", "laco", "--metric", "norm"), "--metric and --method laco exclude"),
        (("--method", "laco", "--quantize", "gptq-4bit"), "method: got laco with quantize"),
    ):
        assert problem in refusal(*arguments, *words, *common)
    found = refusal(*arguments, "--method", "laco", "--depth", "6", tmp_path / "out")
    assert "depth: got 6, allowed: 1 to 5" in found
    for method, problem in (
        ("laco", "method: laco cannot merge the layers of a model of type llama: its weights"),
        ("linear-patch", "repair: cannot be folded into a model of type llama: its weights"),
    ):
        found = refusal("--model", small_quantized, "--method", method, *common)
        assert problem in found
        assert "Traceback" not in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["laco", "linear-patch"])
def test_experts_are_refused(method: str, tmp_path: Path) -> None:
    (experts,) = (each for each in ARCHITECTURES if str(each) == "Mixtral")
    make_checkpoint(experts, tmp_path / "model")
    found = refusal(
        "--model", tmp_path / "model", "--method", method, "--depth", "2", tmp_path / "out"
    )
    assert "it has experts" in found
