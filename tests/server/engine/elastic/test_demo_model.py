"""The demo model: what is promised of it, and exactness at every one of its depths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.train_demo_model import bits_per_character
from server.engine.base import LayerSelection
from server.model.demo_corpus import Part, documents
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import running_engine

ORDER = (9, 8, 10, 7, 11, 6, 5, 12, 4, 3, 13, 2, 14, 1, 15, 0)
NUM_LAYERS = len(ORDER)
NUM_TOKENS = 24


def skips(depth: int) -> tuple[int, ...]:
    return tuple(sorted(ORDER[: NUM_LAYERS - depth]))


def test_every_depth_and_pairs_of_depths_in_one_batch(demo_model: Path) -> None:
    text = next(documents([Part.HELD_OUT]))
    rng = random.Random(0)
    pairs = [(depth, depth) for depth in range(1, NUM_LAYERS + 1)]
    pairs += [(rng.randint(1, NUM_LAYERS), rng.randint(1, NUM_LAYERS)) for _ in range(16)]
    selections = [LayerSelection(skips(prefill), skips(decode)) for prefill, decode in pairs]
    with running_engine(demo_model) as engine:
        ids = engine.engine.tokenize(text)
        prompts = [ids[start : start + 20 + 3 * start] for start in range(len(pairs))]
        generated = engine.generate(prompts, selections, NUM_TOKENS)
    for (prefill, decode), prompt, tokens in zip(pairs, prompts, generated, strict=True):
        if prefill == decode:
            model = reference.cut(demo_model, skips(decode))
            expected = reference.generate(model, prompt, NUM_TOKENS)
        else:
            layers = LayerSelection(skips(prefill), skips(decode))
            model = reference.load(demo_model)
            expected = reference.generate_with_skips(model, prompt, NUM_TOKENS, layers)
        assert tokens == expected, f"prefill depth {prefill}, decode depth {decode}"


def test_weights_are_small_and_fit_every_kernel(demo_model: Path) -> None:
    path = demo_model / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it has no iterator
            tensor = weights.get_tensor(name)
            assert tensor.dtype is torch.bfloat16
            assert all(size % 64 == 0 for size in tensor.shape), name
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - tied
    config = json.loads((demo_model / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == NUM_LAYERS
    assert config["head_dim"] in (32, 64)


def test_parts_of_the_corpus_are_apart() -> None:
    parts = {part: set(documents([part])) for part in Part}
    assert all(parts.values())
    held_out = parts.pop(Part.HELD_OUT)
    assert all(held_out.isdisjoint(part) for part in parts.values())


def test_model_card_says_what_training_measured(demo_model: Path) -> None:
    training = json.loads((demo_model / "training.json").read_text("utf-8"))
    bits = training["held_out_bits_per_character"]
    assert bits <= 1.6
    assert f"{bits:.3f} bits per character" in (demo_model / "README.md").read_text("utf-8")


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="slow without bfloat16 instructions"
)
def test_bits_per_character_are_those_of_the_card(demo_model: Path) -> None:
    """On the documentation of this Python, which is not always the one it was trained on."""
    training = json.loads((demo_model / "training.json").read_text("utf-8"))
    texts = list(documents([Part.HELD_OUT]))
    if sum(map(len, texts)) != training["held_out_characters"]:
        pytest.skip("this Python's documentation is another edition")
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model)
    bits, perplexity = bits_per_character(model, tokenizer, texts, 512)
    assert bits == pytest.approx(training["held_out_bits_per_character"], rel=0.005)
    assert perplexity == pytest.approx(training["held_out_perplexity"], rel=0.02)
