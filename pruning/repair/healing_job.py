"""One training of maps from its inputs in files to its result in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.quality import Quality, measure_quality
from pruning.repair.healing import HealingStep, heal
from pruning.repair.maps import RepairMaps
from pruning.repair.storage import load_maps, maps_fingerprint, save_maps


@dataclass(frozen=True, slots=True)
class HealingJob:
    """A training of maps for the layers ``skipped`` of the model in the directory ``model``.

    It begins with the maps in the file ``closed_form``; None: with zero. ``windows`` are token
    ids to train on. The result is judged on ``held_out``, windows that it is not trained on; none:
    it is not judged. The maps are written to ``out``; ``checkpoint`` keeps the state until they
    are.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    model_fingerprint: str
    text_fingerprint: str
    skipped: Sequence[int]
    closed_form: str | None
    windows: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    steps: int
    seed: int
    out: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class HealingReport:
    """The quality on held-out text of the dense model, and without the layers: with nothing in
    their place, with the closed-form maps, if there are some, and with the healed ones.
    """

    dense: Quality
    plain: Quality
    closed_form: Quality | None
    healed: Quality

    @property
    def before(self) -> Quality:
        """The quality of what the training began with."""
        return self.closed_form or self.plain


def run_job(
    job: HealingJob, model: Any, on_step: Callable[[HealingStep], None] | None = None
) -> HealingReport | None:
    """Train on ``model``, which has been loaded; return how the result was judged.

    Raises what :func:`pruning.repair.healing.heal` and :func:`load_maps` do, and
    :class:`pruning.quality.QualityError` for too few windows to judge on.
    """
    import torch

    closed_form, started_from = None, None
    if job.closed_form is not None:
        closed_form = load_maps(Path(job.closed_form))
        closed_form.check_model(
            job.model_fingerprint, closed_form.num_layers, closed_form.hidden_size
        )
        started_from = maps_fingerprint(Path(job.closed_form))
    healed = heal(
        model,
        [torch.tensor(window) for window in job.windows],
        job.skipped,
        closed_form,
        model_fingerprint=job.model_fingerprint,
        text_fingerprint=job.text_fingerprint,
        started_from=started_from,
        steps=job.steps,
        seed=job.seed,
        checkpoint=Path(job.checkpoint),
        on_step=on_step,
    )
    report = _judged(job, model, closed_form, healed) if job.held_out else None
    save_maps(healed, Path(job.out))
    return report


def _judged(
    job: HealingJob, model: Any, closed_form: RepairMaps | None, healed: RepairMaps
) -> HealingReport:
    import torch

    windows = [torch.tensor(window, device=model.device) for window in job.held_out]
    dense, plain = measure_quality(model, windows, [(), job.skipped])

    def quality(maps: RepairMaps) -> Quality:
        return measure_quality(model, windows, [job.skipped], stand_ins=maps.layers)[0]

    return HealingReport(
        dense=dense,
        plain=plain,
        closed_form=None if closed_form is None else quality(closed_form),
        healed=quality(healed),
    )
