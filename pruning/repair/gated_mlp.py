"""Gated MLPs: each stands in for one run of skipped layers.

ShortGPT heals a pruned model with light gated MLPs, one in place of each run of removed layers
(arXiv 2403.03853, section 4.6 and appendix F). Here such an MLP turns the residual stream x into ::

    x + W_down^T (silu(n W_gate^T) * (n W_up^T)),    n = x / sqrt(mean x^2 + eps),

with a hidden size of its own, the intermediate size. It does the work of the whole run at once, in
the place of the run's first layer. MLPs are trained for one set of skipped layers
(:mod:`pruning.repair.gated_healing`), and stand in where these are skipped and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.repair.errors import RepairError
from pruning.repair.folding import runs_of
from pruning.repair.maps import Healing, check_made_for

if TYPE_CHECKING:
    import torch

_EPS = 1e-6
# The matrices of an MLP, [intermediate, hidden] each, in the order in which they are stored.
NUM_MATRICES = 3


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """What stands in for one run of layers: it adds to x, [..., hidden], what the formula says.

    ``weight`` is [3, intermediate, hidden]: W_gate, W_up and W_down.
    """

    weight: torch.Tensor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.added(states)

    def added(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is added to ``states``, [..., hidden], computed in their type."""
        from torch.nn import functional

        weight = self.weight.to(states)
        normed = functional.rms_norm(states, states.shape[-1:], eps=_EPS)
        gate, up = (normed @ weight[:-1].flatten(0, 1).T).chunk(2, -1)
        added: torch.Tensor = (functional.silu(gate) * up) @ weight[-1]
        return added


@dataclass(frozen=True, slots=True)
class GatedMlps:
    """An MLP for each run of the skipped layers ``healing.skipped``, by the run's first layer.

    They were trained on ``num_tokens`` tokens of a text, from MLPs that add nothing.

    Raises :class:`RepairError` for values that make no such MLPs.
    """

    layers: Mapping[int, GatedMlp]
    num_layers: int
    model_fingerprint: str
    text_fingerprint: str
    num_tokens: int
    healing: Healing

    def __post_init__(self) -> None:
        firsts = [run[0] for run in self.runs]
        if not firsts or sorted(self.layers) != firsts:
            raise RepairError(
                f"runs: got MLPs of the layers {sorted(self.layers)}, allowed: {firsts or 'some'}, "
                "the first of each run of skipped layers"
            )
        for layer in self.healing.skipped:
            if not 0 <= layer < self.num_layers:
                raise RepairError(
                    f"healing.skipped: got layer {layer}, allowed: 0 to {self.num_layers - 1}"
                )
        shapes = {tuple(mlp.weight.shape) for mlp in self.layers.values()}
        for layer, mlp in self.layers.items():
            shape = list(mlp.weight.shape)
            if len(shape) != 3 or shape[0] != NUM_MATRICES or 0 in shape or len(shapes) > 1:
                raise RepairError(
                    f"layer {layer}: got an MLP of shape {shape}, allowed: "
                    f"[{NUM_MATRICES}, intermediate, hidden], the same for all runs"
                )
            if not bool(mlp.weight.isfinite().all()):
                raise RepairError(f"layer {layer}: its MLP holds a NaN or an infinity")
        if self.num_tokens < 1:
            raise RepairError(f"num_tokens: got {self.num_tokens}, allowed: 1 or more")

    @property
    def runs(self) -> list[tuple[int, ...]]:
        """The runs of neighbouring skipped layers, ascending."""
        return runs_of(self.healing.skipped)

    @property
    def intermediate_size(self) -> int:
        return next(iter(self.layers.values())).weight.shape[1]

    @property
    def hidden_size(self) -> int:
        return next(iter(self.layers.values())).weight.shape[2]

    @property
    def num_parameters(self) -> int:
        return sum(mlp.weight.numel() for mlp in self.layers.values())

    def check_model(self, fingerprint: str, num_layers: int, hidden_size: int) -> None:
        """Raise :class:`RepairError` unless the MLPs were trained for this model."""
        check_made_for(self, "MLPs", fingerprint, num_layers, hidden_size)


def equal_size(num_skipped: int, num_gaps: int, hidden_size: int) -> int:
    """Return the intermediate size with which MLPs have as many parameters as maps, rounded.

    Each of ``num_skipped`` layers has a map of hidden^2 parameters, and each of ``num_gaps`` runs
    of them an MLP of 3 x hidden x the result.
    """
    return max(1, round(num_skipped * hidden_size / (NUM_MATRICES * num_gaps)))
