"""Healing: the maps of one set of skipped layers, trained by distillation.

As the layers of section 4.6 of ShortGPT (arXiv 2403.03853) they replace what was removed, but
they begin with maps in closed form, so that minutes are enough. Such maps belong to the set of
layers that they were trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.decoder import StandIn
from pruning.repair.distillation import DEFAULT_STEPS, Distillation, HealingStep
from pruning.repair.errors import RepairError
from pruning.repair.maps import LayerMap, RepairMaps

if TYPE_CHECKING:
    import torch
    from torch import nn

# Adam's learning rate at the first step.
LEARNING_RATE = 3e-4


def heal(
    model: nn.Module,
    windows: Sequence[torch.Tensor],
    skipped: Collection[int],
    closed_form: RepairMaps | None = None,
    *,
    model_fingerprint: str,
    text_fingerprint: str,
    started_from: str | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    checkpoint: Path | None = None,
    layers: Sequence[nn.Module] | None = None,
    on_step: Callable[[HealingStep], None] | None = None,
) -> RepairMaps:
    """Return maps of the layers ``skipped``, trained to stand in for them all at once.

    They begin with those of ``closed_form``, whose fingerprint is ``started_from``; without it
    with zero, which is a plain skip. ``windows``, ``steps``, ``checkpoint`` and the time and memory
    that it takes are those of a :class:`Distillation`.

    Raises what :class:`Distillation` and its ``run`` do, and :class:`RepairError` for
    ``closed_form`` that lacks one of the layers or is of another width.
    """
    training = Distillation(
        model,
        windows,
        skipped,
        model_fingerprint=model_fingerprint,
        steps=steps,
        seed=seed,
        layers=layers,
    )
    first = _first_maps(training, sorted(skipped), closed_form)
    state = training.run(first, stand_ins, LEARNING_RATE, checkpoint, on_step)
    return RepairMaps(
        layers={
            layer: LayerMap(
                weight.cpu(),
                0.0 if closed_form is None else closed_form.layers[layer].ridge,
                1.0 if closed_form is None else closed_form.layers[layer].unexplained,
            )
            for layer, weight in state.best.items()
        },
        num_layers=training.num_layers,
        model_fingerprint=model_fingerprint,
        text_fingerprint=text_fingerprint,
        num_tokens=training.num_tokens,
        healing=training.healing(state, started_from),
    )


def stand_ins(maps: Mapping[int, torch.Tensor]) -> dict[int, StandIn]:
    """Return what skipped layers do instead with these maps, each [hidden, hidden]."""

    def stand_in(weight: torch.Tensor) -> StandIn:
        return lambda states: states + states @ weight.to(states.dtype)

    return {layer: stand_in(weight) for layer, weight in maps.items()}


def _first_maps(
    training: Distillation, skipped: Sequence[int], closed_form: RepairMaps | None
) -> dict[int, torch.Tensor]:
    import torch

    hidden_size, device = training.hidden_size, training.device
    if closed_form is None:
        return {layer: torch.zeros(hidden_size, hidden_size, device=device) for layer in skipped}
    if missing := [layer for layer in skipped if layer not in closed_form.layers]:
        raise RepairError(f"closed_form: there is no map of layer {missing[0]}, which is skipped")
    if closed_form.hidden_size != hidden_size:
        raise RepairError(
            f"hidden_size: the maps are of a model with {closed_form.hidden_size}, allowed: "
            f"{hidden_size}, that of this model"
        )
    return {
        layer: closed_form.layers[layer].weight.detach().to(device, torch.float32, copy=True)
        for layer in skipped
    }
