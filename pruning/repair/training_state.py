"""The state of a training, kept so that one that was interrupted goes on where it was."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.checkpoint import CheckpointError
from pruning.durable import replace_file
from pruning.repair.errors import RepairError
from pruning.repair.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    import torch

_KEY = "fathom_healing"
_VERSION = 1
# The tensors of each layer: what is trained, Adam's two moments of it, and the best so far.
_PARTS = ("weight", "first_moment", "second_moment", "best")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainingState:
    """Weights by layer after ``step`` steps.

    Those of maps are float32 [hidden, hidden], those of MLPs [3, intermediate, hidden].
    ``best`` are those with the least divergence on held-out text, ``best_loss``, in nats a
    token; ``first_loss`` is that of the weights before the first step. ``num_stale`` is how many
    evaluations in a row have found none better.
    """

    weight: dict[int, torch.Tensor]
    first_moment: dict[int, torch.Tensor]
    second_moment: dict[int, torch.Tensor]
    best: dict[int, torch.Tensor]
    step: int = 0
    first_loss: float = math.inf
    best_loss: float = math.inf
    num_stale: int = 0


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """The file that keeps the state of one training.

    ``identity`` is all that the training depends on: the state of another one is not used.
    """

    path: Path
    identity: Mapping[str, object] = field(default_factory=dict)

    def load(self) -> TrainingState | None:
        """Return the state; None, with a warning, where it is damaged or of another training."""
        if not self.path.exists():
            return None
        try:
            return self._load()
        except (RepairError, CheckpointError, OSError) as error:
            logger.warning("healing begins anew: %s", error)
            return None

    def save(self, state: TrainingState) -> None:
        """Write the state; a reader sees the old one or the new one, never a part."""
        tensors = {
            f"{layer}.{part}": tensor.detach().cpu().contiguous()
            for part in _PARTS
            for layer, tensor in getattr(state, part).items()
        }
        description = {
            "version": _VERSION,
            "identity": dict(self.identity),
            "step": state.step,
            "first_loss": state.first_loss,
            "best_loss": state.best_loss,
            "num_stale": state.num_stale,
        }
        replace_file(self.path, write_tensors(_KEY, json.dumps(description), tensors))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _load(self) -> TrainingState:
        text, tensors = read_tensors(_KEY, self.path)
        try:
            description: dict[str, Any] = json.loads(text)
            if description["version"] != _VERSION:
                raise RepairError(f"version: found {description['version']!r}, allowed: {_VERSION}")
            if description["identity"] != json.loads(json.dumps(dict(self.identity))):
                raise RepairError("the state of another training")
            parts: dict[str, dict[int, torch.Tensor]] = {part: {} for part in _PARTS}
            for name, tensor in tensors.items():
                layer, part = name.split(".")
                parts[part][int(layer)] = tensor
            return TrainingState(
                **parts,
                step=int(description["step"]),
                first_loss=float(description["first_loss"]),
                best_loss=float(description["best_loss"]),
                num_stale=int(description["num_stale"]),
            )
        except RepairError as error:
            raise RepairError(f"{self.path}: {error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise RepairError(f"{self.path}: its description is damaged: {error!r}") from None
