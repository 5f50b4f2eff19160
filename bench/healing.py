"""Healed maps for a comparison of depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pruning.fingerprint import model_fingerprint, token_fingerprint
from pruning.repair.distillation import HealingStep
from pruning.repair.healing_job import HealingJob, run_job
from pruning.transformers_model import load_model
from server.telemetry.progress import ProgressReport


@dataclass(frozen=True)
class Trainer:
    """Trains maps for one set of skipped layers after the other, with transformers.

    ``closed_form`` is the file of the maps that every training begins with, ``windows`` are the
    token ids to train on. The results are files in ``output``.
    """

    model: Path
    dtype: str
    closed_form: Path
    windows: Sequence[Sequence[int]]
    steps: int
    seed: int
    output: Path

    def train(self, skipped: tuple[int, ...], name: str, progress: ProgressReport) -> Path:
        """Return the file of the trained maps."""
        path = self.output / f"healed-{'-'.join(map(str, skipped))}.safetensors"
        if path.exists():
            return path

        def show(step: HealingStep) -> None:
            progress.advance(name, step.step, step.num_steps)

        job = HealingJob(
            model=str(self.model),
            dtype=self.dtype,
            trust_remote_code=False,
            model_fingerprint=model_fingerprint(self.model),
            text_fingerprint=token_fingerprint(self.windows),
            skipped=skipped,
            closed_form=str(self.closed_form),
            windows=self.windows,
            held_out=[],
            steps=self.steps,
            seed=self.seed,
            out=str(path),
            checkpoint=str(path.with_suffix(".training")),
        )
        run_job(job, self._loaded, show)
        return path

    @cached_property
    def _loaded(self) -> Any:
        return load_model(self.model, self.dtype, trust=False)
