"""What engines are given that are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.models import prepare_model
from bench.options import Options
from bench.subjects import base
from bench.subjects.base import EngineSettings


@pytest.mark.parametrize("gpus", [[], ["NVIDIA H100 80GB HBM3"]])
def test_engines_beside_each_other_on_a_gpu_do_not_ask_for_all_of_it(
    gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "describe_hardware", lambda: {"gpus": gpus})
    model = prepare_model(Options(model="demo", work_dir=str(tmp_path)))
    settings = EngineSettings(model, "float32", 512, 8, 1 << 20, engine_args={"block_size": 32})
    plain, fathom = settings.vllm_arguments(), settings.fathom_engine_args()
    assert ("distributed_executor_backend" in plain) == (not gpus)
    for arguments in (plain, fathom):
        assert ("gpu_memory_utilization" in arguments) == bool(gpus)
        # With a size of its own for the KV cache, ten engines fit.
        assert arguments.get("gpu_memory_utilization", 0.0) <= 0.1
        assert arguments["kv_cache_memory_bytes"] == 1 << 20
    assert fathom["block_size"] == 32
