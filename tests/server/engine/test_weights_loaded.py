"""The rule for which weights are loaded, compared with vLLM's loader itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pruning.checkpoint import CheckpointError
from pruning.weights import INDEX, weight_files

NAMES = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model-2.safetensors",
    "model-10.safetensors",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    ".hidden.safetensors",
    "model.bin",
]


def loaded_by_vllm(directory: Path) -> list[str] | None:
    """Return the files in the order in which vLLM reads them, None where it refuses."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.weight_utils import _natural_sort_key

    loader = DefaultModelLoader(LoadConfig(load_format="safetensors"))
    try:
        _, files, _, _ = loader._prepare_weights(str(directory), None, None, True, None)
    except (FileNotFoundError, RuntimeError):
        return None
    return [Path(file).name for file in sorted(files, key=_natural_sort_key)]


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.sets(st.sampled_from(NAMES)),
    named=st.none() | st.sets(st.sampled_from(NAMES[:7]), min_size=1),
)
def test_the_files_are_those_of_vllm(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], named: set[str] | None
) -> None:
    directory = tmp_path_factory.mktemp("model")
    for file in files:
        save_file({"weight": torch.zeros(1)}, directory / file)
    if named is not None:
        index = {"weight_map": {f"weight.{name}": name for name in sorted(named)}}
        (directory / INDEX).write_text(json.dumps(index))
    try:
        found: list[str] | None = [path.name for path in weight_files(directory)]
    except CheckpointError:
        found = None
    assert found == loaded_by_vllm(directory)
