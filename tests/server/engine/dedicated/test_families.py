"""Models that the elastic engine does not run, with random weights, against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, PretrainedConfig, StableLmConfig

from pruning.fingerprint import model_fingerprint
from pruning.metrics import dense_pass
from pruning.plan import Plan
from server.engine.base import LayerSelection
from server.engine.dedicated.checkpoints import CheckpointStore
from server.engine.elastic.architectures import ELASTIC_ARCHITECTURES
from tests.server.engine.dedicated.running_engine import NUM_TOKENS, RunningEngines
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.test_families import SHAPE, make_checkpoint

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: OPTConfig(
        vocab_size=2048,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.15,
    ),
    "stablelm": lambda: StableLmConfig(**SHAPE),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / family, FAMILIES[family]())
    rng = random.Random(0)
    windows = [[rng.randrange(1, 2048) for _ in range(60)] for _ in range(2)]
    prompts = [[rng.randrange(1, 2048) for _ in range(length)] for length in (40, 7, 33)]
    fingerprint = model_fingerprint(checkpoint)
    placeholder: Any = None  # until the layers are ranked
    running = RunningEngines(checkpoint, tmp_path / "state", placeholder)
    try:
        assert running.engine.model.architecture not in ELASTIC_ARCHITECTURES
        importance = running.run(running.engine.measure_importance(windows, lambda *_: None))
        plan = running.plan = Plan.from_dense_pass(
            dense_pass(importance),
            model_fingerprint=fingerprint,
            text_fingerprint="sha256:random",
            versions={},
        )
        skipped = plan.skipped(4)
        layers = LayerSelection(skipped, skipped)
        running.prepare({"only": layers})
        store = CheckpointStore(
            tmp_path / "state", checkpoint, family, fingerprint, with_code=False
        )
        exported = reference.load(running.run(store.checkpoint(plan, skipped)))
        assert exported.config.num_hidden_layers == 4
        expected = [reference.generate(exported, prompt, NUM_TOKENS) for prompt in prompts]
        assert running.generate(prompts, layers) == expected
    finally:
        running.close()
