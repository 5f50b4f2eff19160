"""``fathom heal``: what it keeps is better on text it never saw, the rest is refused."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.quality import measure_quality
from pruning.repair import GatedMlps, load_maps, load_stand_ins, maps_fingerprint
from tests.conftest import data_path
from tests.fathom_command import FATHOM, environment, fathom_in_process
from tests.pruning.surgery.exporting import plan_of

ORDER = (2, 3, 1, 4, 0)
SKIPPED = (2, 3)


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(json.loads(data_path("text/tinystories_1000.json").read_text("utf-8")))


@pytest.fixture
def arguments(stories_model: Path, stories: list[str], tmp_path: Path) -> list[str | Path]:
    """Arguments that heal the model on some stories, and judge the result on others."""
    (tmp_path / "train.json").write_text(json.dumps(stories[:100]))
    (tmp_path / "judge.json").write_text(json.dumps(stories[500:530]))
    plan_of(stories_model, ORDER).save(tmp_path / "plan.json")
    values: dict[str, str | Path] = {
        "model": stories_model,
        "dtype": "float32",
        "calibration": tmp_path / "train.json",
        "quality-text": tmp_path / "judge.json",
        "plan": tmp_path / "plan.json",
        "state-dir": tmp_path / "state",
    }
    flags: list[str | Path] = ["heal"]
    for name, value in values.items():
        flags += [f"--{name}", value]
    return flags


def healed_files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state").glob("healed-*.safetensors"))


def test_what_is_better_is_kept(
    arguments: list[str | Path], stories_model: Path, stories: list[str], tmp_path: Path
) -> None:
    result = fathom_in_process(*arguments, "--depth", "3", "--steps", "60")
    assert result.returncode == 0, result.stderr
    assert "Depth 3 of 5 layers; layers skipped: 2, 3" in result.stdout
    [path] = healed_files(tmp_path)
    assert f"Kept in {path}" in result.stdout.replace("\n", "")
    maps = load_maps(path)
    assert maps.healing is not None
    assert maps.healing.skipped == SKIPPED
    [closed_form] = (tmp_path / "state").glob("repair-*.safetensors")
    assert maps.healing.started_from == maps_fingerprint(closed_form)
    assert [file.suffix for file in (tmp_path / "state").glob("healing-*")] == [".json"]

    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    windows = [torch.tensor(tokenizer(text).input_ids) for text in stories[800:820]]
    closed = load_maps(closed_form).layers
    before, after = (
        measure_quality(model, windows, [SKIPPED], stand_ins=layers)[0]
        for layers in (closed, maps.layers)
    )
    assert after.perplexity < before.perplexity

    again = fathom_in_process(*arguments, "--depth", "3", "--steps", "60")
    assert again.returncode == 0, again.stderr
    assert f"Trained before: kept in {path}" in again.stdout
    path.unlink()
    third = fathom_in_process(*arguments, "--depth", "3", "--steps", "60")
    assert "Kept in" in third.stdout, "what is kept no longer is trained again"
    assert load_maps(path).healing == maps.healing


def test_gated_mlps_that_are_better_are_kept(
    arguments: list[str | Path], stories_model: Path, stories: list[str], tmp_path: Path
) -> None:
    given = [*arguments, "--depth", "2", "--kind", "gated-mlp", "--steps", "60"]
    given += ["--intermediate-size", "256"]
    result = fathom_in_process(*given)
    assert result.returncode == 0, result.stderr
    assert "gated MLPs" in result.stdout
    [path] = healed_files(tmp_path)
    assert f"Kept in {path}" in result.stdout.replace("\n", "")
    mlps = load_stand_ins(path)
    assert isinstance(mlps, GatedMlps)
    assert (mlps.runs, mlps.intermediate_size) == ([(1, 2, 3)], 256)
    [closed_form] = (tmp_path / "state").glob("repair-*.safetensors")

    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    windows = [torch.tensor(tokenizer(text).input_ids) for text in stories[800:820]]
    before, after = (
        measure_quality(model, windows, [(1, 2, 3)], stand_ins=layers)[0]
        for layers in (load_maps(closed_form).layers, mlps.layers)
    )
    assert after.perplexity < before.perplexity
    again = fathom_in_process(*given)
    assert f"Trained before: kept in {path}" in again.stdout


def test_what_is_not_better_is_not_kept(
    arguments: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruning.repair.healing.LEARNING_RATE", 1.0)
    result = fathom_in_process(*arguments, "--depth", "3")
    assert result.returncode == 0, result.stderr
    assert "Not kept, because it is not better on held-out text: perplexity" in result.stdout
    assert not healed_files(tmp_path)
    again = fathom_in_process(*arguments, "--depth", "3")
    assert "Trained before: perplexity" in again.stdout


def test_a_killed_command_goes_on(arguments: list[str | Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    given = [*map(str, arguments), "--depth", "2", "--steps", "60"]
    with subprocess.Popen(
        [FATHOM, *given], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while not any(state.glob("healing-*.safetensors")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)  # or this process would take the time that the other one needs
        process.kill()
    assert not healed_files(tmp_path)
    assert fathom_in_process(*given).returncode == 0
    [resumed] = healed_files(tmp_path)
    kept = load_maps(resumed)
    for file in state.glob("heal*"):
        file.unlink()
    assert fathom_in_process(*given).returncode == 0
    whole = load_maps(resumed)
    assert replace(whole, layers=kept.layers) == kept
    for layer, layer_map in whole.layers.items():
        assert torch.equal(layer_map.weight, kept.layers[layer].weight)


def test_the_depths_of_levels_are_healed(arguments: list[str | Path], tmp_path: Path) -> None:
    levels = "dense=5,fast=3,prompt=3/5,mixed=2/3,short=2"
    result = fathom_in_process(*arguments, "--levels", levels, "--steps", "20")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("Depth")]
    assert lines == [
        "Depth 3 of 5 layers; layers skipped: 2, 3",
        "Depth 2 of 5 layers; layers skipped: 1, 2, 3",
    ]


def test_a_ranking_is_measured_where_there_is_none(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    place = arguments.index("--plan")
    del arguments[place : place + 2]
    result = fathom_in_process(*arguments, "--depth", "4", "--steps", "5")
    assert result.returncode == 0, result.stderr
    assert "Depth 4 of 5 layers; layers skipped: " in result.stdout
    assert list((tmp_path / "state").glob("plan-*.json"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["--depth", "6"], "depth: got 6, allowed: 1 to 5"),
        (["--depth", "5"], "depth: got 5, allowed: 1 to 4; where no layer is skipped, there is"),
        (["--levels", "dense=5,mixed=2/3"], "levels: none skips layers that one set of maps can"),
        (["--depth", "3", "--steps", "0"], "heal_steps: "),
        (["--depth", "3", "--kind", "mlp"], "heal_kind: got 'mlp', allowed: maps, gated-mlp"),
        (["--depth", "3", "--intermediate-size", "9"], "heal_intermediate_size: got 9, allowed: "),
        (["--depth", "3", "--quality-text", "short.json"], "quality_text: "),
        (["--depth", "3", "--calibration", "short.json"], "calibration: text: got "),
        (["--depth", "3", "--calibration", "some.json"], "heal: text: got "),
    ],
)
def test_what_cannot_be_healed_is_refused(
    arguments: list[str | Path],
    stories: list[str],
    changes: list[str],
    problem: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "short.json").write_text(json.dumps(["A cat."]))
    (tmp_path / "some.json").write_text(json.dumps([story[:150] for story in stories[:8]]))
    changes = [str(tmp_path / part) if part.endswith(".json") else part for part in changes]
    result = fathom_in_process(*arguments, *changes)
    assert result.returncode == 2, result.stdout
    assert problem in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not healed_files(tmp_path)


def test_a_plan_by_a_search_must_be_there(arguments: list[str | Path]) -> None:
    place = arguments.index("--plan")
    del arguments[place : place + 2]
    result = fathom_in_process(*arguments, "--depth", "3", "--metric", "greedy_kl")
    assert result.returncode == 2
    assert "metric: got 'greedy_kl', but" in result.stderr
    assert "a server makes one, or --plan names one" in result.stderr


def test_the_plan_of_another_model_is_refused(
    arguments: list[str | Path], demo_model: Path, tmp_path: Path
) -> None:
    plan_of(demo_model, tuple(range(16))).save(tmp_path / "plan.json")
    result = fathom_in_process(*arguments, "--depth", "3")
    assert result.returncode == 2
    assert "plan: " in result.stderr


def test_quantized_models_are_refused(arguments: list[str | Path], small_quantized: Path) -> None:
    result = fathom_in_process(*arguments, "--depth", "3", "--model", small_quantized)
    assert result.returncode == 2
    assert "a model that is not quantized: quantized weights pass no gradients on" in result.stderr
