"""The maps of a model's layers, with their provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pruning.repair.errors import RepairError

if TYPE_CHECKING:
    import torch

# What is trained in place of skipped layers: a map for each, or a gated MLP for each run of them.
HealingKind = Literal["maps", "gated-mlp"]


@dataclass(frozen=True, slots=True)
class LayerMap:
    """What stands in for one layer: it turns x, [..., hidden], into x + x ``weight``.

    ``weight`` is [hidden, hidden]; ``ridge`` and ``unexplained`` as in
    :class:`pruning.repair.fit.FittedMap`.
    """

    weight: torch.Tensor
    ridge: float
    unexplained: float

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return states + states @ self.weight.to(states)


@dataclass(frozen=True, slots=True)
class Healing:
    """How stand-ins were trained for the layers ``skipped``, for all of them at once.

    ``started_from`` is the fingerprint of the closed-form maps that the training began with;
    None: with a plain skip. It was to take ``steps`` steps, and has taken ``num_steps_taken``.
    ``first_loss`` and ``loss`` are the divergence from the dense model on text that was held out
    of the training, in nats a token, before it and of what was kept.
    """

    skipped: tuple[int, ...]
    started_from: str | None
    steps: int
    num_steps_taken: int
    seed: int
    first_loss: float
    loss: float

    def serves(self, prefill_skips: tuple[int, ...], decode_skips: tuple[int, ...]) -> bool:
        """Return whether what was trained may stand in where these layers are skipped.

        That is where prompt and generated tokens skip the layers that it was trained for, or one
        of the two does and the other none.
        """
        return {prefill_skips, decode_skips} - {()} == {self.skipped}


@dataclass(frozen=True, slots=True)
class RepairMaps:
    """A map for each of some layers of a model, fitted on ``num_tokens`` tokens of a text.

    With ``healing`` they were trained on these tokens, and belong to one set of skipped layers.
    ``ridge`` and ``unexplained`` are then those of the maps that the training began with.

    Raises :class:`RepairError` for values that make no maps.
    """

    layers: Mapping[int, LayerMap]
    num_layers: int
    model_fingerprint: str
    text_fingerprint: str
    num_tokens: int
    healing: Healing | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise RepairError("layers: got none, allowed: at least one")
        sizes = {len(layer_map.weight) for layer_map in self.layers.values()}
        for layer, layer_map in self.layers.items():
            weight = layer_map.weight
            if not 0 <= layer < self.num_layers:
                raise RepairError(f"layers: got layer {layer}, allowed: 0 to {self.num_layers - 1}")
            if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or len(sizes) > 1:
                raise RepairError(
                    f"layer {layer}: got a map of shape {list(weight.shape)}, allowed: "
                    "[hidden, hidden], the same for all layers"
                )
            if not bool(weight.isfinite().all()):
                raise RepairError(f"layer {layer}: its map holds a NaN or an infinity")
            for name in ("ridge", "unexplained"):
                value = getattr(layer_map, name)
                if not math.isfinite(value):
                    raise RepairError(f"layer {layer}: {name}: got {value}, allowed: a number")
        if self.num_tokens < 1:
            raise RepairError(f"num_tokens: got {self.num_tokens}, allowed: 1 or more")
        if self.healing is not None and self.healing.skipped != tuple(sorted(self.layers)):
            raise RepairError(
                f"healing.skipped: got {list(self.healing.skipped)}, allowed: "
                f"{sorted(self.layers)}, the layers that there are maps of"
            )

    @property
    def hidden_size(self) -> int:
        return len(next(iter(self.layers.values())).weight)

    @property
    def num_bytes(self) -> int:
        """Memory that the maps take."""
        return sum(m.weight.numel() * m.weight.element_size() for m in self.layers.values())

    def check_model(self, fingerprint: str, num_layers: int, hidden_size: int) -> None:
        """Raise :class:`RepairError` unless the maps were fitted for this model."""
        check_made_for(self, "maps", fingerprint, num_layers, hidden_size)


class MadeForModel(Protocol):
    """What stands in for layers of one model."""

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def model_fingerprint(self) -> str: ...


def check_made_for(
    stand_ins: MadeForModel, what: str, fingerprint: str, num_layers: int, hidden_size: int
) -> None:
    """Raise :class:`RepairError`, which calls ``stand_ins`` so, unless they are of this model."""
    for name, found, allowed in (
        ("num_layers", stand_ins.num_layers, num_layers),
        ("hidden_size", stand_ins.hidden_size, hidden_size),
        ("model_fingerprint", stand_ins.model_fingerprint, fingerprint),
    ):
        if found != allowed:
            raise RepairError(
                f"{name}: the {what} are of a model with {found}, allowed: {allowed}, that of "
                "this model"
            )
