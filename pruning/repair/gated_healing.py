"""Healing by gated MLPs: the MLPs of one set of skipped layers, trained by distillation.

The training is that of maps (:mod:`pruning.repair.healing`) with another learning rate: same loss,
tokens, optimizer and schedule. W_down begins with 0, so it begins with a plain skip and needs
no fit before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.decoder import StandIn
from pruning.repair.distillation import DEFAULT_STEPS, Distillation, HealingStep
from pruning.repair.errors import RepairError
from pruning.repair.folding import runs_of
from pruning.repair.gated_mlp import NUM_MATRICES, GatedMlp, GatedMlps, equal_size

if TYPE_CHECKING:
    import torch
    from torch import nn

# These weights begin at random, so they have further to go than maps in closed form.
LEARNING_RATE = 1e-3


def heal_gated(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    skipped: Collection[int],
    *,
    intermediate_size: int | None = None,
    model_fingerprint: str,
    text_fingerprint: str,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    learning_rate: float | None = None,
    checkpoint: Path | None = None,
    layers: Sequence[nn.Module] | None = None,
    on_step: Callable[[HealingStep], None] | None = None,
) -> GatedMlps:
    """Return MLPs of ``intermediate_size``, one for each run of ``skipped``, trained at once.

    Without ``intermediate_size`` they get as many parameters as maps of these layers have
    (:func:`equal_size`), without ``learning_rate`` :data:`LEARNING_RATE`. ``seed`` also decides
    what W_gate and W_up begin with. All else is as in :func:`pruning.repair.healing.heal`, which
    also says what is raised; :class:`RepairError` also for an ``intermediate_size`` below 1.
    """
    if intermediate_size is not None and intermediate_size < 1:
        raise RepairError(f"intermediate_size: got {intermediate_size}, allowed: 1 or more")
    training = Distillation(
        model,
        windows,
        skipped,
        model_fingerprint=model_fingerprint,
        steps=steps,
        seed=seed,
        layers=layers,
    )
    state = training.run(
        _first(training, skipped, intermediate_size, seed),
        _stand_ins,
        LEARNING_RATE if learning_rate is None else learning_rate,
        checkpoint,
        on_step,
    )
    return GatedMlps(
        layers={layer: GatedMlp(weight.cpu()) for layer, weight in state.best.items()},
        num_layers=training.num_layers,
        model_fingerprint=model_fingerprint,
        text_fingerprint=text_fingerprint,
        num_tokens=training.num_tokens,
        healing=training.healing(state),
    )


def _stand_ins(weights: Mapping[int, torch.Tensor]) -> dict[int, StandIn]:
    return {layer: GatedMlp(weight) for layer, weight in weights.items()}


def _first(
    training: Distillation, skipped: Collection[int], intermediate_size: int | None, seed: int
) -> dict[int, torch.Tensor]:
    """Return weights that do nothing: W_down is 0, the others are random as in linear layers."""
    import torch

    hidden_size = training.hidden_size
    runs = runs_of(skipped)
    size = intermediate_size or equal_size(len(skipped), len(runs), hidden_size)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for run in runs:
        weight = torch.randn(NUM_MATRICES, size, hidden_size, generator=generator)
        weight /= math.sqrt(hidden_size)
        weight[-1] = 0
        weights[run[0]] = weight.to(training.device)
    return weights
