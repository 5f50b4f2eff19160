"""A level's engine over two processes: the tokens of transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
import torch

from server.engine.base import LayerSelection
from server.engine.ranks import Ranks
from tests.conftest import data_path
from tests.server.engine.dedicated.running_engine import NUM_TOKENS, RunningEngines
from tests.server.engine.dedicated.test_checkpoints import plan_of
from tests.server.engine.elastic import reference

pytestmark = pytest.mark.skipif(
    (torch.cuda.is_available() and torch.cuda.device_count() < 2)
    or (not torch.cuda.is_available() and len(os.sched_getaffinity(0)) < 2),
    reason="two ranks need two GPUs, or two cores",
)


def test_tokens_of_a_level_over_two_ranks(stories_model: Path, tmp_path: Path) -> None:
    layers = LayerSelection((2, 3), (2, 3))
    running = RunningEngines(
        stories_model, tmp_path, plan_of(stories_model), Ranks(tensor_parallel_size=2)
    )
    try:
        running.prepare({"half": layers})
        (core,) = running.processes()
        workers = [
            child
            for child in psutil.Process(core).children(recursive=True)
            if "resource_tracker" not in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
        prompts = [running.engine.tokenize(story)[: 5 + 11 * n] for n, story in enumerate(stories)]
        dense = reference.load(stories_model)
        assert running.generate(prompts[:4], layers) == [
            reference.generate_with_skips(dense, prompt, NUM_TOKENS, layers)
            for prompt in prompts[:4]
        ]
    finally:
        running.close()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
