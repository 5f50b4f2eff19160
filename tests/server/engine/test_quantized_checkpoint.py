"""Quantized checkpoints that vLLM cannot load are refused before it tries, field by field."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pruning.checkpoint import CheckpointError
from server.engine import quantized_checkpoint
from server.engine.elastic import compatibility
from server.engine.quantized_checkpoint import (
    check_loadable,
    experts_problem,
    serving_problem,
)
from server.errors import InvalidArgument

GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
}
COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
LAYER = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts.0.down_proj"


@pytest.fixture(autouse=True)
def cpu_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


def checkpoint(
    directory: Path,
    rules: object = None,
    *,
    packed: bool = True,
    layer: str = LAYER,
    old: object = None,
) -> Path:
    directory.mkdir(exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama"}
    if rules is not None:
        config["quantization_config"] = rules
    (directory / "config.json").write_text(json.dumps(config))
    if old is not None:
        (directory / "quantize_config.json").write_text(json.dumps(old))
    name = f"{layer}.{'qweight' if packed else 'weight'}"
    save_file({name: torch.zeros(1, dtype=torch.int32)}, directory / "model.safetensors")
    return directory


def refusal(directory: Path, dtype: str = "auto", **engine_args: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_loadable(directory, dtype, engine_args)
    return str(caught.value)


@pytest.mark.parametrize(
    "rules",
    [
        GPTQ,
        {**GPTQ, "group_size": -1, "desc_act": True},
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        {**GPTQ, "dynamic": {"-:.*mlp.*": {}, "+:.*attn.*": {"group_size": 64}}},
        AWQ,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False},
        {**AWQ, "version": "GEMM"},
    ],
)
def test_what_vllm_loads(tmp_path: Path, rules: dict[str, Any]) -> None:
    check_loadable(checkpoint(tmp_path / "model", rules), "auto", {})


def test_weights_that_are_not_quantized(tmp_path: Path) -> None:
    check_loadable(checkpoint(tmp_path / "model", packed=False), "float32", {})
    # A file that nobody reads says nothing.
    check_loadable(checkpoint(tmp_path / "model", packed=False, old=GPTQ), "float32", {})


@pytest.mark.parametrize(
    ("rules", "field", "said"),
    [
        ({**GPTQ, "bits": 3}, "bits", "found 3, allowed: 4"),
        ({**GPTQ, "bits": 2}, "bits", "found 2, allowed: 4"),
        ({**GPTQ, "bits": "4"}, "bits", "found '4', allowed: 4"),
        ({**GPTQ, "sym": False}, "sym", "found False, allowed: true: vLLM's kernels know no zero"),
        ({**GPTQ, "sym": "true"}, "sym", "found 'true', allowed: true or false"),
        ({**GPTQ, "desc_act": True}, "desc_act", "found True, allowed: false, or a group_size"),
        ({**GPTQ, "desc_act": 1}, "desc_act", "found 1, allowed: true or false"),
        ({**GPTQ, "group_size": 48}, "group_size", "found 48, allowed: -1, 32, 64, 128"),
        ({**GPTQ, "group_size": None}, "group_size", "found None, allowed: -1, 32, 64, 128"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format", "found 'marlin', allowed:"),
        (
            {**GPTQ, "dynamic": {"+:.*mlp.*": {"bits": 3}}},
            "dynamic.+:.*mlp.*.bits",
            "found 3, allowed: 4",
        ),
        ({**GPTQ, "dynamic": []}, "dynamic", "found [], allowed: an object of rules"),
        ({**GPTQ, "dynamic": {"a": 1}}, "dynamic.a", "found 1, allowed: an object"),
        ({**GPTQ, "quant_method": None}, "quant_method", "found None, allowed: the name of a"),
        ({**GPTQ, "quant_method": 4}, "quant_method", "found 4, allowed: the name of a method"),
        ({**AWQ, "bits": 8}, "bits", "found 8, allowed: 4"),
        ({**AWQ, "version": "gemv"}, "version", "found 'gemv', allowed: gemm"),
        ({**AWQ, "zero_point": 1}, "zero_point", "found 1, allowed: true or false"),
        ({**AWQ, "group_size": 7}, "group_size", "found 7, allowed: -1, 32, 64, 128"),
    ],
)
def test_what_vllm_cannot_load(
    tmp_path: Path, rules: dict[str, Any], field: str, said: str
) -> None:
    model = checkpoint(tmp_path / "model", rules)
    expected = f"{model / 'config.json'}: quantization_config.{field}: {said}"
    assert refusal(model).startswith(expected)


@pytest.mark.parametrize("rules", [GPTQ, AWQ])
def test_what_vllm_needs_is_missing(tmp_path: Path, rules: dict[str, Any]) -> None:
    for field in rules.keys() - {"quant_method"}:
        rest = {name: value for name, value in rules.items() if name != field}
        found = refusal(checkpoint(tmp_path / "model", rest))
        assert f"quantization_config.{field}: found nothing, allowed: a value" in found


def test_8_bits_need_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path / "model", {**GPTQ, "bits": 8})
    monkeypatch.setattr(quantized_checkpoint, "is_for_cpu", lambda: True)
    assert "bits: found 8, allowed: 4 on a CPU: vLLM has kernels" in refusal(model)
    monkeypatch.setattr(quantized_checkpoint, "is_for_cpu", lambda: False)
    check_loadable(model, "auto", {})


def test_configurations_that_are_none(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "gptq")
    assert refusal(model).endswith("quantization_config: found 'gptq', allowed: an object")
    model = checkpoint(tmp_path / "model", GPTQ, packed=False)
    assert "none of its tensors is packed (*.qweight), though config.json says" in refusal(model)


def test_layouts_of_older_tools(tmp_path: Path) -> None:
    old = {name: value for name, value in GPTQ.items() if name != "quant_method"}
    model = checkpoint(tmp_path / "model", old=old)
    found = refusal(model)
    assert "config.json: quantization_config: found nothing, allowed: the content of " in found
    assert 'quantize_config.json with a "quant_method", such as "gptq"' in found
    # vLLM reads that file where it is told how the weights are quantized.
    check_loadable(model, "auto", {"quantization": "gptq"})
    model = checkpoint(tmp_path / "model", old={**old, "bits": 3})
    found = refusal(model, quantization="gptq")
    assert found.startswith(f"{model / 'quantize_config.json'}: bits: found 3, allowed: 4")
    (model / "quantize_config.json").write_text("[")
    assert "quantize_config.json: not a complete JSON" in refusal(model, quantization="gptq")
    (model / "quantize_config.json").unlink()
    assert "found nothing, allowed: how the weights, which are packed" in refusal(model)


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        (GPTQ, "none: "),
        (AWQ, "none: "),
        (COMPRESSED, "none with packed integers: "),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": COMPRESSED}},
            "none with packed integers: ",
        ),
    ],
)
def test_packed_weights_on_a_cpu_without_avx512(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any], allowed: str
) -> None:
    model = checkpoint(tmp_path / "model", rules)
    check_loadable(model, "auto", {})
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(compatibility, "is_for_cpu", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert refusal(model) == (
        f"{model / 'config.json'}: quantization_config.quant_method: found "
        f"'{rules['quant_method']}', allowed: {allowed}vLLM's kernel for weights of 4 bits needs "
        "a GPU, or a CPU with AVX-512"
    )
    problem = serving_problem(4, {f"{LAYER}.weight"})
    assert problem == "vLLM's kernel for weights of 4 bits needs a GPU, or a CPU with AVX-512"
    # The other builds of vLLM are one for all of their processors.
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_loadable(model, "auto", {})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compatibility, "is_for_cpu", lambda: False)
    check_loadable(model, "auto", {})
    assert serving_problem(4, {f"{LAYER}.weight"}) is None


def test_other_formats_of_compressed_tensors_need_no_such_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    rules = {**COMPRESSED, "format": "int-quantized", "config_groups": {"group_0": {"a": 1}}}
    check_loadable(checkpoint(tmp_path / "model", rules, packed=False), "auto", {})


def test_the_rule_is_that_of_vllm() -> None:
    """The kernel is there where it is said to be, and missing where it is said to be missing."""
    script = (
        "import torch, vllm\n"
        "from vllm.platforms import current_platform\n"
        "from server.engine.elastic.compatibility import is_for_cpu, packed_weights_problem\n"
        "current_platform.import_kernels()\n"
        "name = 'cpu_gemm_wna16' if is_for_cpu() else 'gptq_gemm'\n"
        "print(hasattr(torch.ops._C, name) == (packed_weights_problem() is None))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.endswith("True\n"), found.stderr


def test_float32(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", GPTQ)
    with pytest.raises(InvalidArgument, match=re.escape("dtype: got 'float32', allowed: auto,")):
        check_loadable(model, "float32", {})


def test_quantized_experts_without_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path / "model", GPTQ, layer=EXPERT)
    monkeypatch.setattr(quantized_checkpoint, "is_for_cpu", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "quant_method: found 'gptq', allowed: none: this is a mixture of experts" in refusal(
        model
    )
    assert experts_problem({f"{LAYER}.weight"}) is None
    assert serving_problem(4, {f"{LAYER}.weight"}) is None
    problem = serving_problem(4, {f"{EXPERT}.weight"})
    assert problem is not None
    assert problem.startswith("this is a mixture of experts")
    assert serving_problem(8, set()) == "vLLM has its kernel for weights of 8 bits for GPUs alone"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    check_loadable(model, "auto", {})
    monkeypatch.setattr(quantized_checkpoint, "is_for_cpu", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    check_loadable(model, "auto", {})
