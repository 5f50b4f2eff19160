from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.pruning.surgery.exporting import INDEX


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Four layers of every kind of tensor, in three shards, with all files beside them."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {
        "num_hidden_layers": 4,
        "auto_map": {"AutoModel": "modeling.Model"},
        "quantization_config": {"bits": 4, "dynamic": {r"-:.*\.layers\.3\..*": {}}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    rules: Any = {"dynamic": {r"-:.*\.layers\.2\..*": {}}}
    (directory / "quantize_config.json").write_text(json.dumps(rules))
    generator = torch.Generator().manual_seed(0)
    content = {"model.embed_tokens.weight": torch.randn(16, 8, generator=generator)}
    for layer in range(4):
        name = f"model.layers.{layer}.mlp"
        content |= {
            f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, (4, 8), dtype=torch.int32),
            f"{name}.g_idx": torch.arange(layer, layer + 5, dtype=torch.int64),
            f"{name}.scales": torch.randn(3, 8, generator=generator).half(),
            f"{name}.fp8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
            f"{name}.bias": torch.randn(7, generator=generator).bfloat16(),
            f"{name}.empty": torch.zeros(0, 3),
            f"{name}.flag": torch.tensor([bool(layer % 2)]),
            f"{name}.scalar": torch.tensor(float(layer)),
        }
    weight_map: dict[str, str] = {}
    for number, keep in enumerate([(0, 1), (2,), (3,)], start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        shard = {k: v for k, v in content.items() if (number == 1 and "embed" in k) or
                 any(f"layers.{layer}." in k for layer in keep)}  # fmt: skip
        save_file(shard, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE",
                 "generation_config.json", "modeling.py", "pytorch_model.bin", ".gitattributes",
                 "pytorch_model.bin.index.json"):  # fmt: skip
        (directory / name).write_text(name)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\nOld card")
    return directory
