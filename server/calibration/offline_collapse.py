"""Layers that are merged into others in an exported checkpoint, chosen on transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pruning.checkpoint import read_config
from pruning.collapse import CollapsedModel, check_mergeable, collapse_layers
from pruning.fingerprint import text_fingerprint
from server.calibration.offline_plan import load_offline, measuring_windows
from server.config import Settings
from server.telemetry.progress import ProgressReport

# Each merge that is tried runs all of them, and some tens to some hundreds are tried.
MAX_TOKENS = 1024


def collapsed_model(
    settings: Settings,
    directory: Path,
    depth: int,
    texts: Sequence[str],
    held_out_texts: Sequence[str],
    report: ProgressReport,
) -> CollapsedModel:
    """Load the model, merge layers until ``depth`` are left, and measure what that costs.

    Raises :class:`pruning.collapse.CollapseError` for layers that cannot be merged,
    :class:`TextError` for text without tokens, :class:`pruning.quality.QualityError` for too little
    held-out text, and what transformers raises for a model that it cannot load.
    """
    import torch

    from pruning.quality import measure_quality

    check_mergeable(read_config(directory))
    with report.working("Loading the model, to merge its layers"):
        model, tokenizer = load_offline(settings, directory)

    def windows_of(texts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
        return [
            torch.tensor(window, device=model.device)
            for window in measuring_windows(model, tokenizer, texts, max_tokens)
        ]

    windows = windows_of(texts, min(settings.calibration_tokens, MAX_TOKENS))
    held_out = windows_of(held_out_texts, settings.quality_tokens)
    collapse = collapse_layers(
        model, windows, depth, on_tried=lambda *c: report.advance("Merging layers", *c)
    )
    removed = collapse.removed
    with report.working("Measuring perplexity with the merges"):
        (merged,) = measure_quality(model, held_out, [removed])
    # Its layers have changed; a copy of all of them would take more memory than a second look.
    del model
    with report.working("Measuring perplexity without the merges"):
        model, _ = load_offline(settings, directory)
        dense, plain = measure_quality(model, held_out, [(), removed])
    return CollapsedModel(
        collapse=collapse,
        text_fingerprint=text_fingerprint(texts),
        dense_perplexity=dense.perplexity,
        plain_perplexity=plain.perplexity,
        perplexity=merged.perplexity,
        num_held_out_tokens=merged.num_tokens,
    )
