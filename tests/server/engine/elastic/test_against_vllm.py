"""The elastic engine against unmodified vLLM on checkpoints that are really cut."""

from __future__ import annotations

import shutil
from pathlib import Path

from server.engine.base import LayerSelection
from tests.conftest import data_path
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.plain_vllm import generate_with_vllm
from tests.server.engine.elastic.running_engine import running_engine

NUM_TOKENS = 32


def test_depth_equals_vllm_on_the_cut_checkpoint(stories_model: Path, tmp_path: Path) -> None:
    removed = (1, 3)
    reference.cut(stories_model, removed).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories_model / name, tmp_path)
    text = data_path("text/austen-emma.txt").read_text("utf-8")
    with running_engine(stories_model) as engine:
        ids = engine.engine.tokenize(text[2000:6000])
        prompts = [ids[start : start + 9 + 7 * start % 90] for start in range(0, 600, 50)]
        # Every other request of the batch runs at full depth.
        cut, full = LayerSelection(removed, removed), LayerSelection()
        selections = [layers for _ in prompts for layers in (cut, full)]
        doubled = [prompt for prompt in prompts for _ in range(2)]
        generated = engine.generate(doubled, selections, NUM_TOKENS)
    assert generated[::2] == generate_with_vllm(tmp_path, prompts, NUM_TOKENS)
    assert generated[1::2] == generate_with_vllm(stories_model, prompts, NUM_TOKENS)
    assert generated[::2] != generated[1::2]
