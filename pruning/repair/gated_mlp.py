"""Gated MLPs in place of skipped layers, trained by distillation.

ShortGPT heals a pruned model with light gated MLPs, one in place of each run of removed layers
(arXiv 2403.03853, section 4.6 and appendix F). Here such an MLP turns the residual stream x into ::

    x + W_down^T (silu(n W_gate^T) * (n W_up^T)),    n = x / sqrt(mean x^2 + eps),

with a hidden size m of its own. W_down begins with 0, so the training begins with a plain skip and
needs no fit before it. It is the training of :mod:`pruning.repair.healing`: the same loss, tokens,
optimizer and schedule, but for the learning rate. Nothing serves these MLPs: they are here to be
compared with healed maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.decoder import StandIn
from pruning.repair.errors import RepairError
from pruning.repair.folding import runs_of
from pruning.repair.healing import DEFAULT_STEPS, HealingStep, distill

if TYPE_CHECKING:
    import torch
    from torch import nn

# These weights begin at random, so they have further to go than maps in closed form.
LEARNING_RATE = 1e-3
_EPS = 1e-6
# The matrices of an MLP, [intermediate, hidden] each, in the order in which they are stored.
_NUM_MATRICES = 3


@dataclass(frozen=True, slots=True)
class GatedMlps:
    """An MLP for each run of skipped layers, by its first layer: float32 [3, intermediate, hidden].

    The matrices are W_gate, W_up and W_down. ``skipped`` are all layers that they stand in for;
    ``first_loss`` and ``loss`` are the divergence from the dense model on text held out of the
    training, in nats a token, of a plain skip and of these MLPs.
    """

    weights: Mapping[int, torch.Tensor]
    skipped: tuple[int, ...]
    num_steps_taken: int
    first_loss: float
    loss: float

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def stand_ins(self) -> dict[int, StandIn]:
        """What the layers do instead, for :func:`pruning.decoder.without_layers`."""
        return gated_stand_ins(self.weights)


def equal_size(num_skipped: int, num_gaps: int, hidden_size: int) -> int:
    """Return the hidden size with which MLPs have as many parameters as maps, rounded.

    Each of ``num_skipped`` layers has a map of hidden^2 parameters, and each of ``num_gaps`` runs
    of them an MLP of 3 x hidden x the result.
    """
    return max(1, round(num_skipped * hidden_size / (_NUM_MATRICES * num_gaps)))


def heal_gated(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    skipped: Collection[int],
    *,
    intermediate_size: int,
    model_fingerprint: str,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    layers: Sequence[nn.Module] | None = None,
    on_step: Callable[[HealingStep], None] | None = None,
) -> GatedMlps:
    """Return MLPs of ``intermediate_size``, one for each run of ``skipped``, trained at once.

    ``windows`` and ``steps`` are as in :func:`pruning.repair.healing.heal`, which also says what is
    raised; :class:`RepairError` also for an ``intermediate_size`` below 1.
    """
    if intermediate_size < 1:
        raise RepairError(f"intermediate_size: got {intermediate_size}, allowed: 1 or more")
    state = distill(
        model,
        windows,
        skipped,
        _first(model, skipped, intermediate_size, seed),
        gated_stand_ins,
        model_fingerprint=model_fingerprint,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        layers=layers,
        on_step=on_step,
    )
    return GatedMlps(
        weights={layer: weight.cpu() for layer, weight in state.best.items()},
        skipped=tuple(sorted(skipped)),
        num_steps_taken=state.step,
        first_loss=state.first_loss,
        loss=state.best_loss,
    )


def gated_stand_ins(weights: Mapping[int, torch.Tensor]) -> dict[int, StandIn]:
    """Return what the first layer of each run does instead, with these weights."""
    return {layer: _stand_in(weight) for layer, weight in weights.items()}


def _stand_in(weight: torch.Tensor) -> StandIn:
    from torch.nn import functional

    def stand_in(states: torch.Tensor) -> torch.Tensor:
        gate, up, down = weight.to(states)
        normed = functional.rms_norm(states, [states.shape[-1]], eps=_EPS)
        added: torch.Tensor = (functional.silu(normed @ gate.T) * (normed @ up.T)) @ down
        return states + added

    return stand_in


def _first(
    model: nn.Module, skipped: Collection[int], intermediate_size: int, seed: int
) -> dict[int, torch.Tensor]:
    """Return weights that do nothing: W_down is 0, the others are random as in linear layers."""
    import torch

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    hidden_size = int(config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for run in runs_of(skipped):
        weight = torch.randn(
            _NUM_MATRICES, intermediate_size, hidden_size, generator=generator
        ) / math.sqrt(hidden_size)
        weight[-1] = 0
        weights[run[0]] = weight.to(embeddings.weight.device)
    return weights
