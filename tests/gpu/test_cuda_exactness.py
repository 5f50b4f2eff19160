"""The elastic engine on CUDA: exact in float32, and in bfloat16 at equal batches."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from server.engine.base import LayerSelection
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.plain_vllm import generate_with_vllm
from tests.server.engine.elastic.running_engine import running_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

NUM_TOKENS = 32
NUM_LAYERS = 16
ORDER = (9, 8, 10, 7, 11, 6, 5, 12, 4, 3, 13, 2, 14, 1, 0, 15)


def skips(depth: int) -> tuple[int, ...]:
    return tuple(sorted(ORDER[: NUM_LAYERS - depth]))


def prompts(num: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1, 2048, (5 + 17 * index % 90,), generator=generator).tolist()
        for index in range(num)
    ]


def test_float32_pairs_of_depths_mixed_equal_transformers(demo_model: Path) -> None:
    depths = (1, 6, 11, 16)
    pairs = list(itertools.product(depths, depths))
    selections = [LayerSelection(skips(prefill), skips(decode)) for prefill, decode in pairs]
    model = reference.load(demo_model)
    given = prompts(len(pairs))
    expected = [
        reference.generate_with_skips(model, prompt, NUM_TOKENS, layers)
        for prompt, layers in zip(given, selections, strict=True)
    ]
    with running_engine(demo_model) as engine:
        assert engine.generate(given, selections, NUM_TOKENS) == expected


@pytest.mark.parametrize("depth", [16, 12, 8, 3])
def test_bfloat16_equals_plain_vllm_at_equal_batches(
    depth: int, demo_model: Path, tmp_path: Path
) -> None:
    reference.cut(demo_model, skips(depth)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, tmp_path)
    given = prompts(8)
    layers = LayerSelection(skips(depth), skips(depth))
    with running_engine(demo_model, dtype="bfloat16") as engine:
        generated = engine.generate(given, [layers] * len(given), NUM_TOKENS)
    assert generated == generate_with_vllm(tmp_path, given, NUM_TOKENS, "bfloat16")
