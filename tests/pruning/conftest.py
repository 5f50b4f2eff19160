from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the path of real data beside the repository; skip the test where it is absent."""

    def path_of(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"../shared/data/{name} is absent")
        return DATA / name

    return path_of


@pytest.fixture(scope="session")
def stories_directory(shared_data: Callable[[str], Path]) -> Path:
    return shared_data("models/stories260K")


@pytest.fixture
def single_thread() -> Iterator[None]:
    """Keep tiny models from spending their time on handing work between threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint of two shards with an index."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05d}-of-00002.safetensors"
        name = f"model.layers.{number - 1}.weight"
        save_file({name: torch.randn(64, 32, generator=generator)}, directory / shard)
        weight_map[name] = shard
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
