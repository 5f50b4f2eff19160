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
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from server.engine.base import LayerSelection
from server.engine.elastic.architectures import (
    ELASTIC_ARCHITECTURES,
    UnsupportedArchitecture,
    elastic_architecture,
)
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.model.source import DEMO_MODEL
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import running_engine

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
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"] * 2
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-with-biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral-with-window": lambda: MistralConfig(**SHAPE, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=64),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[3],
    ),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4),
    "phi-3": lambda: Phi3Config(**SHAPE, pad_token_id=0),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=32),
    "gemma-2-with-windows": lambda: Gemma2Config(**SHAPE, head_dim=32, sliding_window=16),
    "gemma-3-with-windows": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=32, sliding_window=16, layer_types=WINDOWS
    ),
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
    if config.tie_word_embeddings:  # else the last token is predicted again, whatever follows
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.1)
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
    expected = [
        reference.generate_with_skips(model, prompt, 16, layers) for prompt, layers in cases
    ]
    assert len({tuple(tokens) for tokens in expected}) == len(cases)
    with running_engine(checkpoint, compile_layers=True) as engine:
        assert engine.generate([p for p, _ in cases], [s for _, s in cases], 16) == expected


def test_architecture_that_is_not_supported_is_refused_with_those_that_are(tmp_path: Path) -> None:
    config = FalconConfig(
        vocab_size=2048, hidden_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    checkpoint = make_checkpoint(tmp_path / "falcon", config)
    engine = ElasticEngine(ElasticConfig(model=checkpoint, name="falcon"))
    with pytest.raises(UnsupportedArchitecture, match=r"FalconForCausalLM.*supported: Llama"):
        asyncio.run(engine.start())


def test_every_supported_architecture_has_a_class_and_is_tested() -> None:
    from server.engine.elastic.model import ELASTIC_CLASSES

    assert set(ELASTIC_CLASSES) == set(ELASTIC_ARCHITECTURES)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        tested = {
            type(auto.from_config(make_config())).__name__ for make_config in FAMILIES.values()
        }
    assert tested == set(ELASTIC_ARCHITECTURES)
    assert elastic_architecture(["X", "Qwen3ForCausalLM"]) == "FathomElasticQwen3ForCausalLM"
