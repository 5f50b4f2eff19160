"""``fathom export`` with repair that is folded into the weights, and by a metric."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pruning.fingerprint import text_fingerprint, tokenizer_fingerprint
from pruning.plan import Plan
from pruning.surgery import PLAN_FILE
from server.calibration.policy_store import PlanFile
from server.config import load_settings
from server.model.inputs import calibration_texts
from server.state import StateDirectory
from tests.conftest import data_path
from tests.pruning.surgery.conftest import one_thread
from tests.pruning.surgery.exporting import plan_of
from tests.server.cli.test_export import export, refusal
from tests.server.engine.elastic import reference

__all__ = ["one_thread"]

ORDER = (2, 3, 0, 4, 1)


@pytest.fixture
def arguments(stories_model: Path, tmp_path: Path) -> list[str | Path]:
    text = data_path("text/tinystories_1000.json")
    return [
        "--model",
        stories_model,
        "--calibration",
        text,
        "--calibration-tokens",
        "8000",
        "--quality-text",
        text,
        "--state-dir",
        tmp_path / "state",
    ]


@pytest.fixture
def plan_file(stories_model: Path, tmp_path: Path) -> Path:
    plan_of(stories_model, ORDER).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_repair_is_folded_into_the_weights(
    arguments: list[str | Path], plan_file: Path, stories_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lines = export(*arguments, "--plan", plan_file, "--depth", "3", "--repair", "folded", out)
    assert lines[:2] == [
        "Depth 3 of 5; layers removed: 2, 3",
        "Repair folded into the MLPs of the layers: 1",
    ]
    found = re.fullmatch(
        r"Perplexity: ([\d.]+), without repair ([\d.]+), with all layers ([\d.]+); on (\d+) tokens",
        lines[2],
    )
    assert found is not None
    repaired, plain, dense, num_tokens = map(float, found.groups())
    assert dense < repaired < 0.8 * plain
    card = (out / "README.md").read_text()
    assert f"held-out text: {repaired:.2f}; {plain:.2f} without these maps" in card
    assert f"on {num_tokens:.0f} tokens of held-out text" in card
    name = "model.layers.1.mlp.down_proj.weight"
    original = load_file(stories_model / "model.safetensors")[name]
    assert not original.equal(load_file(out / "model.safetensors")[name])
    assert len(reference.generate(reference.load(out), [1, 2, 3], 8)) == 8


def test_nothing_stands_in_for_the_first_layer(
    arguments: list[str | Path], plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lines = export(*arguments, "--plan", plan_file, "--depth", "2", "--repair", "folded", out)
    assert "Nothing stands in for the layers 0: no layer is before them" in lines


def test_what_cannot_be_folded_is_refused(
    arguments: list[str | Path],
    plan_file: Path,
    small_quantized: Path,
    tmp_path: Path,
) -> None:
    common: list[str | Path] = ["--depth", "2", tmp_path / "out"]
    found = refusal(*arguments, "--repair", "closed-form", *common)
    assert "--repair: got 'closed-form', allowed: none, folded; the maps of the server" in found
    found = refusal(*arguments, "--repair", "no", *common)
    assert "--repair: got 'no', allowed: none, folded" in found
    found = refusal("--model", small_quantized, "--repair", "folded", *common)
    assert "repair: cannot be folded into a model of type llama: its weights are quantized" in found
    found = refusal(*arguments, "--repair", "folded", "--calibration-tokens", "64", *common)
    assert "fathom: repair cannot be fitted: text: got" in found
    assert not (tmp_path / "out").exists()


def test_repair_of_the_server_is_not_exported(
    stories_model: Path, plan_file: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("repair: closed-form\n")
    common: list[str | Path] = ["--model", stories_model, "--plan", plan_file, "--depth", "3"]
    lines = export(*common, "--config", settings, tmp_path / "out")
    assert any(line.startswith("repair: closed-form is not exported; the maps") for line in lines)


def test_the_plan_of_a_metric(
    arguments: list[str | Path], stories_model: Path, tmp_path: Path
) -> None:
    """A kept one, one that needs no engine, or none."""
    wanted = [*arguments, "--depth", "3", "--metric"]
    found = refusal(*wanted, "greedy_kl", tmp_path / "none")
    assert "metric: got 'greedy_kl', allowed: block_influence, relative_magnitude, norm, " in found
    assert "angular_distance, reverse_order, sequential; " in found
    assert "has no plan by it of this model and text. 'fathom serve --metric greedy_kl'" in found
    state = tmp_path / "state"
    text = str(data_path("text/tinystories_1000.json"))
    settings = load_settings({"calibration": text, "calibration_tokens": "8000"})
    kept = replace(
        plan_of(stories_model, ORDER),
        metric="greedy_kl",
        other_scores={"greedy_kl": (0.5,) * 5},
        text_fingerprint=text_fingerprint(calibration_texts(settings, stories_model)),
        tokenizer_fingerprint=tokenizer_fingerprint(stories_model),
        created_at=1.0,
    )
    StateDirectory(state).save("plan", {"n": 1}, PlanFile(kept.model_fingerprint, 5), kept)
    export(*wanted, "greedy_kl", tmp_path / "greedy")
    assert Plan.load(tmp_path / "greedy" / PLAN_FILE) == kept
    export(*wanted, "reverse_order", tmp_path / "reverse")
    plan = Plan.load(tmp_path / "reverse" / PLAN_FILE)
    assert (plan.metric, plan.removal_order) == ("reverse_order", (4, 3, 2, 1, 0))
    (line, *_) = export(*arguments, "--depth", "3", tmp_path / "newest")
    assert line == "Depth 3 of 5; layers removed: 3, 4", "whatever is newest"
