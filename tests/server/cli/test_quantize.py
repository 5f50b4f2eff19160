"""``fathom quantize``, and ``fathom export`` of what is quantized."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from pruning.checkpoint import read_config
from pruning.fingerprint import model_fingerprint
from pruning.quantization import QUANTIZATION_FILE
from pruning.surgery import PLAN_FILE, count_layers, export_checkpoint
from server.engine.base import LayerSelection
from server.model.source import DEMO_MODEL
from tests.fathom_command import FATHOM, PATIENCE, environment, fathom, fathom_in_process
from tests.pruning.quantization.small_model import quantize, runs_quantized
from tests.pruning.quantization.test_checkpoint import worker_of
from tests.pruning.surgery.exporting import plan_of, siblings
from tests.server.engine.elastic.plain_vllm import generate_with_vllm
from tests.server.engine.elastic.running_engine import running_engine

FEW = ("--calibration-tokens", "512")


def lines_of(*arguments: str | Path) -> list[str]:
    result = fathom(*arguments)
    assert result.returncode == 0, result.stderr
    return [*result.stdout.splitlines(), *result.stderr.splitlines()]


def refusal(*arguments: str | Path, code: int = 2) -> str:
    result = fathom_in_process(*arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


def test_quantize(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = lines_of("quantize", *FEW, "--group-size", "64", small, out)
    assert lines[0] == "GPTQ, 4 bits, groups of 64"
    assert lines[1] == f"Weights: 1.8 MB, before: 3.8 MB; in {out}"
    assert "Quantizing the layers: 100 %" in lines
    assert read_config(out)["quantization_config"]["group_size"] == 64
    assert siblings(out) == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "quantize: got 'gptq-5bit', allowed: gptq-4bit, gptq-8bit"),
        (["--group-size", "7"], "quantize_group_size: got 7, allowed: -1, 32, 64, 128"),
        (["--group-size", "x"], "quantize_group_size: got 'x', allowed: -1, 32, 64, 128"),
        (["--calibration", "./no.txt"], "fathom: calibration: './no.txt': no such file"),
    ],
)
def test_what_was_asked_wrongly(
    small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in refusal("quantize", *arguments, small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized(
    small: Path, small_quantized: Path, stories_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = refusal("quantize", small_quantized, out)
    assert found.startswith(f"fathom: model: {small_quantized}: is quantized already (gptq)")
    assert "got 172 in-features" in refusal("quantize", stories_model, out)
    assert "model: got './no', allowed: an existing directory" in refusal("quantize", "./no", out)
    out.mkdir()
    assert f"{out}: exists, allowed: a new directory" in refusal("quantize", *FEW, small, out)
    found = refusal("quantize", *FEW, "--overwrite", small, out)
    assert f"{out}: exists and holds no {QUANTIZATION_FILE}" in found
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_after_a_signal(
    small: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [FATHOM, "quantize", *FEW, small, out], stderr=subprocess.PIPE, env=environment()
    )
    assert process.stderr is not None
    try:
        worker = worker_of(psutil.Process(process.pid))
        reported = b""
        while b"Quantizing the layers: 0 %" not in reported:
            line = process.stderr.readline()
            assert line, reported
            reported += line
        process.send_signal(number)
        reported += process.stderr.read()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.stderr.close()
    assert not psutil.wait_procs([worker], timeout=PATIENCE)[1]
    assert b"Traceback" not in reported
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert siblings(out) == []
    else:
        assert not out.exists()


def test_export_in_both_orders(small: Path, tmp_path: Path) -> None:
    plan_of(small, (1,)).save(tmp_path / "plan.json")
    state = tmp_path / "state"
    common: list[str | Path] = ["export", "--model", small, "--plan", tmp_path / "plan.json"]
    common += ["--depth", "2", "--state-dir", state, "--quantize", "gptq-4bit", *FEW]
    for order in ("quantize-then-prune", "prune-then-quantize"):
        out = tmp_path / order
        lines = lines_of(*common, "--order", order, out)
        assert lines[0] == "Depth 2 of 3; layers removed: 1"
        assert "Quantizing the layers: 100 %" in lines
        assert count_layers(out) == 2
        assert (out / PLAN_FILE).is_file()
        assert read_config(out)["quantization_config"]["bits"] == 4
        assert siblings(out) == [order]
    one, other = (
        model_fingerprint(tmp_path / f"{a}-then-{b}")
        for a, b in (("quantize", "prune"), ("prune", "quantize"))
    )
    assert one != other
    # What was quantized at full depth is there for the next depth.
    lines = lines_of(*common, tmp_path / "again")
    assert not any("Quantizing" in line for line in lines)
    assert model_fingerprint(tmp_path / "again") == one
    assert "order: got 'prune-then-quantize', allowed: nothing unless 'quantize'" in refusal(
        "export", "--depth", "2", "--order", "prune-then-quantize", tmp_path / "out"
    )


@runs_quantized
def test_exported_demo_model_equals_the_elastic_engine(tmp_path: Path) -> None:
    quantized = quantize(DEMO_MODEL, tmp_path / "quantized").directory
    plan = plan_of(quantized, (5, 9, 3, 12))
    export_checkpoint(quantized, tmp_path / "out", plan, 12)
    layers = LayerSelection(plan.skipped(12), plan.skipped(12))
    # bfloat16 is not the same at any batch size: the batches are equal.
    with running_engine(quantized, dtype="bfloat16") as engine:
        texts = ("Return the", "The list of", "class ", "Raises an exception when")
        prompts = [engine.engine.tokenize(text) for text in texts]
        elastic = engine.generate(prompts, [layers] * len(prompts), 32)
        dense = engine.generate(prompts, [LayerSelection()] * len(prompts), 32)
    assert generate_with_vllm(tmp_path / "out", prompts, 32, dtype="bfloat16") == elastic
    assert elastic != dense
