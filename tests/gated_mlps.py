"""Gated MLPs that no training has made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pruning.repair import GatedMlp, GatedMlps, Healing
from pruning.repair.folding import runs_of


def random_mlps(
    skipped: Sequence[int],
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int = 8,
    model: str = "sha256:aa",
    scale: float = 0.3,
) -> GatedMlps:
    """Return MLPs for the layers ``skipped``, whose weights are of about the size ``scale``."""
    generator = torch.Generator().manual_seed(sum(skipped))
    shape = (3, intermediate_size, hidden_size)
    return GatedMlps(
        {
            run[0]: GatedMlp(scale * torch.randn(shape, generator=generator))
            for run in runs_of(skipped)
        },
        num_layers=num_layers,
        model_fingerprint=model,
        text_fingerprint="sha256:b",
        num_tokens=100,
        healing=Healing(tuple(sorted(skipped)), None, 60, 60, 0, 0.5, 0.25),
    )
