"""Each supported family, with random weights, against plain transformers."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from server.engine.base import LayerSelection
from server.engine.elastic.architectures import (
    ELASTIC_ARCHITECTURES,
    UnsupportedArchitecture,
    elastic_architecture,
)
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.model_source import DEMO_MODEL
from tests.server.elastic import reference
from tests.server.elastic.running_engine import running_engine

SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-with-biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral-with-window": lambda: MistralConfig(**SHAPE, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=64),
}
SELECTIONS = [
    LayerSelection(),
    LayerSelection((2, 3), (2, 3)),
    LayerSelection((0, 5), (0, 5)),
    LayerSelection((0, 2, 4), ()),
    LayerSelection((1, 2), (2, 3, 4)),
    LayerSelection((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
]


def make_checkpoint(directory: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero as made, which would hide that one is left out
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers_in_a_mixed_batch(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / family, FAMILIES[family]())
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 2048) for _ in range(length)] for length in (40, 7, 33)]
    cases = [(prompt, layers) for layers in SELECTIONS for prompt in prompts]
    model = reference.load(checkpoint)
    window = getattr(model.config, "sliding_window", None)
    expected = [
        reference.generate_with_skips(model, prompt, 16, layers, window) for prompt, layers in cases
    ]
    with running_engine(checkpoint) as engine:
        assert engine.generate([p for p, _ in cases], [s for _, s in cases], 16) == expected


def test_architecture_that_is_not_supported_is_refused_with_those_that_are(tmp_path: Path) -> None:
    shape = SHAPE | {"head_dim": 32}
    checkpoint = make_checkpoint(tmp_path / "gemma", GemmaConfig(**shape))
    engine = ElasticEngine(ElasticConfig(model=checkpoint, name="gemma"))
    with pytest.raises(UnsupportedArchitecture, match=r"GemmaForCausalLM.*supported: Llama"):
        asyncio.run(engine.start())


def test_every_supported_architecture_has_a_class() -> None:
    from server.engine.elastic.model import ELASTIC_CLASSES

    assert set(ELASTIC_CLASSES) == set(ELASTIC_ARCHITECTURES)
    assert elastic_architecture(["X", "Qwen3ForCausalLM"]) == "FathomElasticQwen3ForCausalLM"
