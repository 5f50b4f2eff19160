"""``fathom export``: what it writes runs elsewhere, and equals the engine it was made for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pruning.fingerprint import model_fingerprint, text_fingerprint
from pruning.plan import Plan
from pruning.surgery import PLAN_FILE, count_layers, export_checkpoint
from server.calibration.offline_plan import kept_plan
from server.calibration.policy_store import PlanFile
from server.config import load_settings
from server.engine.base import LayerSelection
from server.model.inputs import calibration_texts
from server.state import StateDirectory
from tests.conftest import data_path
from tests.fathom_command import FATHOM, environment, fathom, fathom_in_process
from tests.pruning.surgery.conftest import one_thread
from tests.pruning.surgery.exporting import large_model, plan_of, siblings
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.plain_vllm import generate_with_vllm
from tests.server.engine.elastic.running_engine import running_engine
from tests.server.model.checkpoint_copy import copy_of

__all__ = ["one_thread"]

NUM_TOKENS = 32
ORDER = (2, 3, 1, 4, 0)


@pytest.fixture
def plan(stories_model: Path) -> Plan:
    return plan_of(stories_model, ORDER)


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


@pytest.fixture(scope="module")
def prompts(stories_model: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [
        tokenizer(story).input_ids[: 5 + 11 * number] for number, story in enumerate(stories[:6])
    ]


# The checkpoint


def test_every_depth_equals_the_cut_model(
    stories_model: Path, plan: Plan, prompts: list[list[int]], tmp_path: Path
) -> None:
    for depth in range(1, 6):
        export_checkpoint(stories_model, tmp_path / str(depth), plan, depth)
        exported = reference.load(tmp_path / str(depth))
        cut = reference.cut(stories_model, plan.skipped(depth))
        for prompt in prompts:
            expected = reference.generate(cut, prompt, NUM_TOKENS)
            assert reference.generate(exported, prompt, NUM_TOKENS) == expected, depth


def test_demo_model_equals_the_cut_model(demo_model: Path, tmp_path: Path) -> None:
    plan = plan_of(demo_model, (5, 9, 3, 12))
    export_checkpoint(demo_model, tmp_path / "out", plan, 12)
    exported = reference.load(tmp_path / "out")
    cut = reference.cut(demo_model, plan.skipped(12))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The list of methods of this object").input_ids
    expected = reference.generate(cut, prompt, NUM_TOKENS)
    assert reference.generate(exported, prompt, NUM_TOKENS) == expected


def test_plain_vllm_equals_the_elastic_engine(
    stories_model: Path, plan: Plan, prompts: list[list[int]], tmp_path: Path
) -> None:
    depth = 3
    export_checkpoint(stories_model, tmp_path / "out", plan, depth)
    layers = LayerSelection(plan.skipped(depth), plan.skipped(depth))
    with running_engine(stories_model) as engine:
        elastic = engine.generate(prompts, [layers] * len(prompts), NUM_TOKENS)
        dense = engine.generate(prompts, [LayerSelection()] * len(prompts), NUM_TOKENS)
    assert generate_with_vllm(tmp_path / "out", prompts, NUM_TOKENS) == elastic
    assert elastic != dense


# The command


def export(*arguments: str | Path) -> list[str]:
    """Run the command; return the lines that it prints and those that it reports."""
    result = fathom("export", *arguments)
    assert result.returncode == 0, result.stderr
    return [*result.stdout.splitlines(), *result.stderr.splitlines()]


def refusal(*arguments: str | Path, code: int = 2) -> str:
    result = fathom_in_process("export", *arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def test_export_by_a_plan(stories_model: Path, plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = export("--model", stories_model, "--plan", plan_file, "--depth", "3", out)
    assert lines[0] == "Depth 3 of 5; layers removed: 2, 3"
    assert lines[1] == f"Weights: 1.1 MB, before: 1.8 MB; in {out}"
    assert "Writing: 100 %" in lines
    assert (count_layers(out), siblings(out)) == (3, ["out"])
    assert "base_model: stories260K\n" in (out / "README.md").read_text()
    # The model that is served when none is named; its directory holds code, too.
    demo = tmp_path / "demo"
    (line, *_) = export("--plan", _demo_plan(tmp_path), "--prune-ratio", "0.01", demo)
    assert line == "Depth 16 of 16; layers removed: none"
    assert not list(demo.glob("*.py"))
    assert "base_model: fathom-demo\n" in (demo / "README.md").read_text()


def _demo_plan(directory: Path) -> Path:
    from server.model.source import DEMO_MODEL

    plan_of(DEMO_MODEL).save(directory / "demo-plan.json")
    return directory / "demo-plan.json"


def test_layers_are_ranked_once(stories_model: Path, tmp_path: Path) -> None:
    text = data_path("text/tinystories_1000.json")
    state = tmp_path / "state"
    common: list[str | Path] = [
        "--model",
        stories_model,
        "--calibration",
        text,
        "--state-dir",
        state,
    ]
    first = export(*common, "--calibration-tokens", "2000", "--depth", "4", tmp_path / "four")
    assert "Loading the model, to rank its layers" in first
    assert "Ranking the layers: 100 %" in first
    second = export(*common, "--calibration-tokens", "2000", "--depth", "2", tmp_path / "two")
    (kept,) = state.glob("plan-*.json")
    assert not any("Loading the model" in line for line in second)
    assert any(line.startswith("Ranked before, on ") and str(kept) in line for line in second)
    plan = Plan.load(kept)
    assert plan.model_fingerprint == model_fingerprint(stories_model)
    # As measured elsewhere on these stories.
    assert plan.scores == pytest.approx((0.230, 0.144, 0.116, 0.122, 0.153), abs=0.02)
    for name, depth in (("four", 4), ("two", 2)):
        assert Plan.load(tmp_path / name / PLAN_FILE) == plan
        assert count_layers(tmp_path / name) == depth


def test_plan_that_a_server_keeps_is_found(
    stories_model: Path, plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings({"model": str(stories_model), "state_dir": str(tmp_path)})
    texts = calibration_texts(settings, stories_model)
    state, fingerprint = StateDirectory(tmp_path), plan.model_fingerprint
    wanted = replace(
        plan,
        text_fingerprint=text_fingerprint(texts),
        tokenizer_fingerprint="sha256:tokenizer",
        created_at=2.0,
    )
    others = [
        replace(wanted, tokenizer_fingerprint="sha256:other", created_at=9.0),
        replace(wanted, model_fingerprint="sha256:1", created_at=9.0),
        replace(wanted, text_fingerprint="sha256:2", created_at=9.0),
        replace(wanted, created_at=1.0, num_tokens=5),
    ]
    for number, kept in enumerate([*others, wanted]):
        state.save("plan", {"n": number}, PlanFile(kept.model_fingerprint, 5), kept)
    (tmp_path / "plan-damaged.json").write_text("{")
    assert kept_plan(settings, fingerprint, "sha256:tokenizer", texts) == wanted
    for metric, found in (("block_influence", wanted), ("greedy_kl", None)):
        assert kept_plan(settings, fingerprint, "sha256:tokenizer", texts, metric) == found
    assert "plan-damaged.json is not used: " in caplog.text
    assert kept_plan(settings, "sha256:3", "sha256:tokenizer", texts) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --depth and --prune-ratio is needed"),
        (["--depth", "2", "--prune-ratio", "0.5"], "--depth and --prune-ratio exclude each other"),
        (["--depth", "2", "--prefill-depth", "1"], "a standalone checkpoint runs the same layers"),
        (["--depth", "6"], "fathom: depth: got 6, allowed: 1 to 5"),
        (["--depth", "0"], "fathom: depth: got 0, allowed: 1 to 5"),
        (["--prune-ratio", "1"], "fathom: prune_ratio: got 1.0, allowed: at least 0 and less than"),
        (["--depth", "2", "--calibration-tokens", "3"], "calibration_tokens: got '3', allowed: 64"),
        (
            ["--depth", "2", "--plan", "no/plan"],
            "fathom: plan: got 'no/plan', allowed: an existing",
        ),
        (
            ["--depth", "2", "--model", "./no"],
            "fathom: model: got './no', allowed: an existing dir",
        ),
        (["--depth", "2", "--calibration", "./no.txt"], "fathom: calibration: './no.txt': no such"),
    ],
)
def test_what_was_asked_wrongly(
    stories_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given: list[str | Path] = ["--state-dir", tmp_path / "state", tmp_path / "out"]
    model: list[str | Path] = [] if "--model" in arguments else ["--model", stories_model]
    assert message in refusal(*arguments, *model, *given)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(
    stories_model: Path, plan: Plan, plan_file: Path, tmp_path: Path
) -> None:
    common: list[str | Path] = ["--depth", "3", "--plan", plan_file]
    model = copy_of(stories_model, tmp_path / "model")
    out = tmp_path / "out"
    shard = model / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = refusal(*common, "--model", model, out)
    assert f"fathom: plan: {plan_file}: model_fingerprint: the plan is of the model" in found
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"fathom: model: {shard}: truncated:" in refusal(*common, "--model", model, out)
    shard.unlink()
    (model / "pytorch_model.bin").touch()
    assert "holds no weights, allowed: one or more *.safetensors" in refusal(
        *common, "--model", model, out
    )
    out.mkdir()
    found = refusal(*common, "--model", stories_model, out)
    assert f"fathom: {out}: exists, allowed: a new directory" in found
    found = refusal(*common, "--model", stories_model, "--overwrite", out)
    assert f"fathom: {out}: exists and holds no {PLAN_FILE}" in found
    assert list(out.iterdir()) == []


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    model = large_model(tmp_path / "model", 1)
    plan_of(model).save(tmp_path / "plan.json")
    out = tmp_path / ("x" * 255)
    found = refusal("--depth", "3", "--plan", tmp_path / "plan.json", "--model", model, out, code=1)
    assert "File name too long" in found


# A shell starts what it runs in the background with SIGINT ignored, tests and all.
HEEDING = """
import os, signal, sys
signal.signal(int(sys.argv[1]), signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    model = large_model(tmp_path / "model", 1 << 30)
    plan_of(model).save(tmp_path / "plan.json")
    out = tmp_path / "out"
    command: list[str | Path] = [FATHOM, "export", "--depth", "2", "--model", model]
    command += ["--plan", tmp_path / "plan.json", out]
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, str(int(number)), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        while process.poll() is None and not list(tmp_path.glob("out.partial-*/*.safetensors")):
            time.sleep(0.01)
        process.send_signal(number)
        printed, reported = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, reported
    assert (printed, siblings(out)) == ("", [])
    assert "Traceback" not in reported
