"""Real quantizations of a small model: what is written, and what is left when it fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pruning.checkpoint import CheckpointError, check_checkpoint, read_config
from pruning.fingerprint import model_fingerprint
from pruning.quantization import (
    QUANTIZATION_FILE,
    Provenance,
    QuantizationError,
    QuantizationFailed,
    QuantizationSettings,
    Stop,
    prune_then_quantize,
)
from pruning.surgery import PLAN_FILE, SurgeryError, count_layers
from tests.pruning.quantization.small_model import (
    NUM_LAYERS,
    TEXT_FINGERPRINT,
    quantize,
    windows,
)
from tests.pruning.surgery.exporting import plan_of, siblings

PATIENCE = 120.0


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def dequantized(weights: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """Return the matrix [out, in] that a kernel computes with."""
    packed, scales = weights[f"{name}.qweight"], weights[f"{name}.scales"].float()
    shifts = torch.arange(0, 32, bits)
    values = (packed[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    integers = values.reshape(-1, packed.shape[1]).float() - 2 ** (bits - 1)
    matrix: torch.Tensor = integers * scales[weights[f"{name}.g_idx"].long()]
    return matrix.T


def test_checkpoint(small: Path, small_quantized: Path) -> None:
    check_checkpoint(small_quantized)
    config, rules = read_config(small), read_config(small_quantized)
    quantization = rules.pop("quantization_config")
    assert rules == config  # as it was, apart from that
    assert (quantization["bits"], quantization["group_size"]) == (4, 128)
    assert (quantization["quant_method"], quantization["desc_act"]) == ("gptq", False)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (small_quantized / name).read_bytes() == (small / name).read_bytes()
    provenance = Provenance.load(small_quantized)
    assert provenance is not None
    assert provenance.base_fingerprint == model_fingerprint(small)
    assert provenance.num_tokens == sum(map(len, windows()))
    assert "- gptq\n" in (small_quantized / "README.md").read_text()
    assert siblings(small_quantized) == [small_quantized.name]


@pytest.mark.parametrize(
    ("settings", "worst"),
    [
        (QuantizationSettings(bits=8, group_size=32), 0.01),
        (QuantizationSettings(group_size=64, act_order=True), 0.2),
        (QuantizationSettings(group_size=-1), 0.3),
    ],
)
def test_weights_are_near_and_groups_in_order(
    small: Path, tmp_path: Path, settings: QuantizationSettings, worst: float
) -> None:
    before = tensors(small)
    weights = tensors(quantize(small, tmp_path / "out", settings).directory)
    matrices = [name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")]
    assert len(matrices) == 7 * NUM_LAYERS
    for name in matrices:
        exact = before[f"{name}.weight"].float()
        found = dequantized(weights, name, settings.bits)
        assert (found - exact).norm() < worst * exact.norm(), name
        size = exact.shape[1] if settings.group_size == -1 else settings.group_size
        assert size is not None
        assert torch.equal(weights[f"{name}.g_idx"].long(), torch.arange(exact.shape[1]) // size)
    for name in before.keys() & weights.keys():
        assert torch.equal(before[name], weights[name]), name
    assert read_config(tmp_path / "out")["quantization_config"]["desc_act"] is False


def test_it_is_repeatable_and_replaces_what_it_wrote(
    small: Path, small_quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SurgeryError, match="exists, allowed: a new directory"):
        quantize(small, out)
    with pytest.raises(SurgeryError, match=f"exists and holds no {QUANTIZATION_FILE}"):
        quantize(small, out, overwrite=True)
    (out / QUANTIZATION_FILE).touch()
    done: list[tuple[int, int]] = []
    written = quantize(small, out, overwrite=True, on_progress=lambda *p: done.append(p))
    assert written.fingerprint == model_fingerprint(small_quantized)
    assert done == [(layers, NUM_LAYERS) for layers in range(NUM_LAYERS + 1)]
    assert siblings(out) == ["out"]


def test_pruning_first(small: Path, tmp_path: Path) -> None:
    written = prune_then_quantize(
        small,
        tmp_path / "out",
        plan_of(small, (1,)),
        2,
        QuantizationSettings(),
        windows(),
        text_fingerprint=TEXT_FINGERPRINT,
        base_model="organization/name",
    )
    assert (written.num_layers, written.depth, written.removed) == (3, 2, (1,))
    assert count_layers(tmp_path / "out") == 2
    assert "quantization_config" in read_config(tmp_path / "out")
    assert (tmp_path / "out" / PLAN_FILE).is_file()
    assert siblings(tmp_path / "out") == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It had been pruned before, from 3 layers" in card


# What cannot be


def test_what_is_quantized_already(small_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"is quantized already \(gptq\)"):
        quantize(small_quantized, tmp_path / "out")
    assert siblings(tmp_path / "out") == []


def test_damaged_models(small: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        quantize(model, tmp_path / "out")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no weights, allowed"):
        quantize(model, tmp_path / "out")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(small / "model.safetensors", model / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: missing"):
        quantize(model, tmp_path / "out")
    assert siblings(tmp_path / "out") == []


def test_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SurgeryError, match=r"needs \d+ bytes .* but 1048576 bytes"):
        quantize(small, tmp_path / "out")
    assert siblings(tmp_path / "out") == []


def test_an_architecture_that_gptqmodel_cannot_load(small: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small, tmp_path / "model"))
    config = {**read_config(model), "model_type": "nonesuch", "architectures": ["Nonesuch"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizationFailed, match="nonesuch") as caught:
        quantize(model, tmp_path / "out")
    assert len(str(caught.value)) <= 300
    assert siblings(tmp_path / "out") == []


# Ends that come too early


def worker_of(process: psutil.Process) -> psutil.Process:
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        for child in process.children():
            with_worker = [word for word in child.cmdline() if word.endswith("quantization.worker")]
            if with_worker:
                return child
        time.sleep(0.005)
    raise AssertionError("no worker has been started")


def test_worker_that_is_killed_when_it_starts_is_reported_and_leaves_nothing(
    small: Path, tmp_path: Path
) -> None:
    killer = threading.Thread(target=lambda: worker_of(psutil.Process()).kill())
    killer.start()
    with pytest.raises(QuantizationFailed, match="was killed"):
        quantize(small, tmp_path / "out")
    killer.join()
    assert siblings(tmp_path / "out") == []


def test_worker_that_is_killed_at_work_is_reported_and_leaves_nothing(
    small: Path, tmp_path: Path
) -> None:
    def kill(done: int, total: int) -> None:
        if done == 1:
            worker_of(psutil.Process()).kill()

    with pytest.raises(QuantizationFailed, match="was killed"):
        quantize(small, tmp_path / "out", on_progress=kill)
    assert siblings(tmp_path / "out") == []


def test_it_can_be_stopped(small: Path, tmp_path: Path) -> None:
    stop = Stop()
    with pytest.raises(QuantizationFailed):
        quantize(small, tmp_path / "out", on_progress=lambda *p: stop(), stop=stop)
    assert siblings(tmp_path / "out") == []


QUANTIZATION = """
import sys
from pathlib import Path
from tests.pruning.quantization.small_model import quantize
def on_progress(done, total):
    print("layers done:", done, flush=True)
quantize(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=on_progress)
print("written", flush=True)
"""


def killed_quantization(model: Path, out: Path, moment: str) -> psutil.Process:
    """Kill a process when it has printed that line of its quantization; return its worker."""
    process = subprocess.Popen(
        [sys.executable, "-c", QUANTIZATION, model, out],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        worker = worker_of(psutil.Process(process.pid))
        printed: list[str] = []
        while moment and f"{moment}\n" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed.append(line)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return worker


def test_killed_parent_leaves_no_process_and_nothing_that_looks_whole(
    small: Path, small_quantized: Path, tmp_path: Path
) -> None:
    out, fingerprint = tmp_path / "out", model_fingerprint(small_quantized)
    # When the worker has started, while it is at work, and when its part is done.
    for moment in ("", "layers done: 1", f"layers done: {NUM_LAYERS}"):
        worker = killed_quantization(small, out, moment)
        assert not psutil.wait_procs([worker], timeout=PATIENCE)[1]
        if out.exists():  # it had been finished
            assert model_fingerprint(out) == fingerprint
            shutil.rmtree(out)
    assert quantize(small, out).fingerprint == fingerprint
    assert siblings(out) == ["out"]
