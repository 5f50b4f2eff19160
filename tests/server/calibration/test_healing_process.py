"""A training in a process of its own: the same result, and an end with whoever has started it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.repair import HealingStep, RepairError, load_maps
from pruning.repair.healing_job import HealingJob, run_job
from server.calibration.healing_process import heal_beside
from tests.conftest import data_path

SKIPPED = (2, 3)


@pytest.fixture
def job(stories_model: Path, tmp_path: Path) -> HealingJob:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:30]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    return HealingJob(
        model=str(stories_model),
        dtype="float32",
        trust_remote_code=False,
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
        skipped=SKIPPED,
        closed_form=None,
        windows=[tokenizer(text, truncation=True, max_length=128).input_ids for text in texts],
        held_out=(),
        steps=20,
        seed=0,
        out=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "state"),
    )


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "pruning.repair.healing_worker" in " ".join(child.cmdline())
    ]


async def test_the_result_is_that_of_this_process(job: HealingJob, tmp_path: Path) -> None:
    steps: list[HealingStep] = []
    await heal_beside(job, steps.append)
    assert [step.step for step in steps] == list(range(21))
    assert steps[-1].num_steps == 20
    assert steps[-1].held_out_loss is not None
    made = load_maps(tmp_path / "out")
    assert made.healing is not None
    assert made.healing.loss < made.healing.first_loss
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_job(replace(job, out=str(tmp_path / "again")), model) is None
    finally:
        torch.set_num_threads(threads)
    again = load_maps(tmp_path / "again")
    for layer in SKIPPED:
        assert torch.equal(again.layers[layer].weight, made.layers[layer].weight)


async def test_it_runs_at_the_lowest_priority_and_ends_when_it_is_cancelled(
    job: HealingJob, tmp_path: Path
) -> None:
    started = asyncio.Event()

    def on_step(step: HealingStep) -> None:
        started.set()

    task = asyncio.create_task(heal_beside(replace(job, steps=100_000), on_step))
    await started.wait()
    [worker] = workers()
    assert worker.nice() == 19
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not worker.is_running()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"windows": [[5, 6, 7]] * 3}, "text: got 6 tokens to train on, allowed: 1024 or more"),
        ({"skipped": ()}, "skipped: got no layers"),
        ({"model": "/absent"}, "/absent"),
        ({"closed_form": "/absent"}, "/absent: no such file"),
    ],
)
async def test_what_goes_wrong_there_is_told_here(
    job: HealingJob, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(RepairError, match=problem):
        await heal_beside(replace(job, **changes), lambda _: None)  # type: ignore[arg-type]
    assert not workers()


async def test_a_killed_process_is_told(job: HealingJob) -> None:
    def on_step(step: HealingStep) -> None:
        for worker in workers():
            worker.kill()

    with pytest.raises(RepairError, match="the process that heals was killed"):
        await heal_beside(replace(job, steps=100_000), on_step)
