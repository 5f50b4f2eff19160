"""One training, of maps or gated MLPs, from its inputs in files to its result in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.quality import Quality, measure_quality
from pruning.repair.distillation import HealingStep
from pruning.repair.gated_healing import heal_gated
from pruning.repair.gated_mlp import GatedMlps
from pruning.repair.healing import heal
from pruning.repair.maps import HealingKind, RepairMaps
from pruning.repair.storage import load_maps, maps_fingerprint, save_gated_mlps, save_maps


@dataclass(frozen=True, slots=True)
class HealingJob:
    """A training of what stands in for the layers ``skipped`` of the model in ``model``.

    ``kind`` says what is trained. Maps begin with those in the file ``closed_form``, or with zero
    if it is None; MLPs, of ``intermediate_size`` (None: as :func:`heal_gated` chooses it), begin
    with a plain skip. ``windows`` are token ids to train on. The result is judged on ``held_out``,
    windows that it is not trained on; none: it is not judged. It is compared with ``closed_form``,
    whatever it began with. It is written to ``out``; ``checkpoint`` keeps the state until it is.
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
    kind: HealingKind = "maps"
    intermediate_size: int | None = None


@dataclass(frozen=True, slots=True)
class HealingReport:
    """The quality on held-out text of the dense model, and without the layers: with nothing in
    their place, with the closed-form maps, if there are some, and with what was trained.
    """

    dense: Quality
    plain: Quality
    closed_form: Quality | None
    healed: Quality

    @property
    def before(self) -> Quality:
        """The quality of what would stand in if nothing were trained."""
        return self.closed_form or self.plain


def run_job(
    job: HealingJob, model: Any, on_step: Callable[[HealingStep], None] | None = None
) -> HealingReport | None:
    """Train on ``model``, which has been loaded; return how the result was judged.

    Raises what :func:`pruning.repair.healing.heal`, :func:`heal_gated` and :func:`load_maps` do,
    and :class:`pruning.quality.QualityError` for too few windows to judge on.
    """
    closed_form = None
    if job.closed_form is not None:
        closed_form = load_maps(Path(job.closed_form))
        closed_form.check_model(
            job.model_fingerprint, closed_form.num_layers, closed_form.hidden_size
        )
    healed = _trained(job, model, closed_form, on_step)
    report = _judged(job, model, closed_form, healed) if job.held_out else None
    if isinstance(healed, GatedMlps):
        save_gated_mlps(healed, Path(job.out))
    else:
        save_maps(healed, Path(job.out))
    return report


def _trained(
    job: HealingJob,
    model: Any,
    closed_form: RepairMaps | None,
    on_step: Callable[[HealingStep], None] | None,
) -> RepairMaps | GatedMlps:
    import torch

    windows = [torch.tensor(window) for window in job.windows]
    options: dict[str, Any] = {
        "model_fingerprint": job.model_fingerprint,
        "text_fingerprint": job.text_fingerprint,
        "steps": job.steps,
        "seed": job.seed,
        "checkpoint": Path(job.checkpoint),
        "on_step": on_step,
    }
    if job.kind == "gated-mlp":
        size = job.intermediate_size
        return heal_gated(model, windows, job.skipped, intermediate_size=size, **options)
    started_from = None if job.closed_form is None else maps_fingerprint(Path(job.closed_form))
    return heal(model, windows, job.skipped, closed_form, started_from=started_from, **options)


def _judged(
    job: HealingJob, model: Any, closed_form: RepairMaps | None, healed: RepairMaps | GatedMlps
) -> HealingReport:
    import torch

    windows = [torch.tensor(window, device=model.device) for window in job.held_out]
    dense, plain = measure_quality(model, windows, [(), job.skipped])

    def quality(of: RepairMaps | GatedMlps) -> Quality:
        return measure_quality(model, windows, [job.skipped], stand_ins=of.layers)[0]

    return HealingReport(
        dense=dense,
        plain=plain,
        closed_form=None if closed_form is None else quality(closed_form),
        healed=quality(healed),
    )
