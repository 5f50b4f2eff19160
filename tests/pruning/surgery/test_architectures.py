from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import (
    ARCHITECTURES,
    BY_NAME,
    EXPERTS,
    SHARED,
    SIZES,
    Architecture,
    hf,
    make_checkpoint,
)
from tests.pruning.models import generate, load, logits, without_layers
from tests.pruning.surgery.exporting import export, read


@dataclass(frozen=True)
class Variant(Architecture):
    """``left_out`` is taken from the configuration, so that the library's rules decide."""

    left_out: tuple[str, ...] = ()


def gemma3(**more: Any) -> Any:
    return hf.Gemma3TextConfig(**SIZES, sliding_window=8, **more)


def gemma3_with_vision() -> Any:
    vision: Any = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return hf.Gemma3Config(text_config=gemma3(), vision_config=vision, mm_tokens_per_image=4)


VARIANTS = (
    Variant(
        "Qwen2 by a rule",
        "Qwen2ForCausalLM",
        BY_NAME["Qwen2 with windows in some layers"].config,
        left_out=("layer_types",),
    ),
    Variant(
        "Gemma 2 by a rule",
        "Gemma2ForCausalLM",
        BY_NAME["Gemma 2"].config,
        left_out=("layer_types",),
    ),
    Variant(
        "Gemma 3 by a rule",
        "Gemma3ForCausalLM",
        lambda: gemma3(sliding_window_pattern=3),
        left_out=("layer_types",),
    ),
    Variant(
        "Gemma 3 with vision",
        "Gemma3ForConditionalGeneration",
        gemma3_with_vision,
        "model.language_model.layers",
    ),
    Variant(
        "SmolLM3 by a rule",
        "SmolLM3ForCausalLM",
        BY_NAME["SmolLM3"].config,
        left_out=("layer_types", "no_rope_layers"),
    ),
    Variant(
        "Llama 4 with short chunks",
        "Llama4ForCausalLM",
        lambda: hf.Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=8,
        ),
    ),
    Variant(
        "GPT-Neo by a pattern",
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(
            vocab_size=96,
            hidden_size=64,
            num_layers=6,
            num_heads=2,
            window_size=8,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 3]],
        ),
        "transformer.h",
        left_out=("attention_layers",),
    ),
    Variant(
        "Qwen3-MoE in every other layer",
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(
            **SIZES,
            **EXPERTS,
            moe_intermediate_size=16,
            num_experts=4,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
        ),
    ),
    Variant("Olmo 3", "Olmo3ForCausalLM", lambda: hf.Olmo3Config(**SHARED, sliding_window=8)),
)


@pytest.mark.filterwarnings("ignore:Could not load the custom kernel")
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *VARIANTS], ids=str)
def test_exports_generate_what_the_model_without_these_layers_does(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = make_checkpoint(architecture, tmp_path / "model")
    config = read(model / "config.json")
    assert config["architectures"] == [architecture.class_name]
    for name in architecture.left_out if isinstance(architecture, Variant) else ():
        assert config.pop(name)
    (model / "config.json").write_text(json.dumps(config))
    results: list[list[list[int]]] = []
    for removed in [(2, 3), (1, 2, 5), (0, 4)]:
        out = tmp_path / f"out-{len(results)}"
        export(model, out, removed, with_code=architecture.has_code)
        exported, expected = load(out), without_layers(load(model), architecture.layers, removed)
        results.append(generate(exported))
        assert results[-1] == generate(expected), removed
        torch.testing.assert_close(logits(exported), logits(expected))
    results.append(generate(load(model)))
    assert all(a != b for a, b in itertools.combinations(results, 2))
