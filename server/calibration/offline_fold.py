"""Repair that is folded into an exported checkpoint, fitted on transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pruning.checkpoint import read_config
from pruning.fingerprint import text_fingerprint
from pruning.repair import split_windows
from pruning.repair.folding import FoldedRepair, FoldMethod, check_foldable, fit_folds, folded
from pruning.repair.linear_patch import fit_linear_patches
from server.calibration.offline_plan import load_offline, measuring_windows
from server.config import Settings
from server.telemetry.progress import ProgressReport

_FITS = {FoldMethod.REPLACE_ME: fit_folds, FoldMethod.LINEAR_PATCH: fit_linear_patches}


def fitted_folds(
    settings: Settings,
    directory: Path,
    removed: Sequence[int],
    texts: Sequence[str],
    held_out_texts: Sequence[str],
    report: ProgressReport,
    method: FoldMethod = FoldMethod.REPLACE_ME,
) -> FoldedRepair:
    """Load the model, fit maps for the gaps between ``removed``, and measure what they gain.

    Raises :class:`pruning.repair.RepairError` for a model into which nothing can be folded and
    for too little text, :class:`TextError` for text without tokens, and what transformers raises
    for a model that it cannot load.
    """
    import torch

    from pruning.quality import measure_quality

    check_foldable(read_config(directory))
    with report.working("Loading the model, to fit repair"):
        model, tokenizer = load_offline(settings, directory)

    def windows_of(texts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
        return [
            torch.tensor(window, device=model.device)
            for window in measuring_windows(model, tokenizer, texts, max_tokens)
        ]

    windows = windows_of(texts, settings.calibration_tokens)
    held_out = windows_of(held_out_texts, settings.quality_tokens)
    with report.working("Fitting repair"):
        folds = _FITS[method](model, windows, removed)
    with report.working("Measuring perplexity with repair and without"):
        dense, plain = measure_quality(model, held_out, [(), removed])
        with folded(model, folds):
            (repaired,) = measure_quality(model, held_out, [removed])
    fit, _ = split_windows(windows)
    return FoldedRepair(
        folds=folds,
        num_tokens=sum(map(len, fit)),
        text_fingerprint=text_fingerprint(texts),
        dense_perplexity=dense.perplexity,
        plain_perplexity=plain.perplexity,
        perplexity=repaired.perplexity,
        num_held_out_tokens=repaired.num_tokens,
        method=method,
    )
