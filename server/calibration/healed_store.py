"""Healed maps of one model, kept in the state directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruning.durable import replace_file
from pruning.repair import RepairError, load_maps
from server.state import JsonEntry, StateDirectory
from server.state_keys import healed_key, healing_key

_MAPS_KIND = "healed"
_TRAINING_KIND = "healing"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training has come to.

    ``problem`` says what was not better on held-out text; empty: the maps were kept.
    """

    problem: str


@dataclass(frozen=True, slots=True)
class Training:
    """All that the result of a training depends on, but for the model and the layers.

    ``tokens`` is the fingerprint of the token ids to train on, ``started_from`` that of the
    closed-form maps, ``held_out`` that of the token ids that the result is judged on.
    """

    tokens: str
    held_out: str
    started_from: str
    dtype: str
    steps: int
    seed: int


class HealedStore:
    """The files of healed maps, one for each set of skipped layers, and of unfinished trainings."""

    def __init__(self, directory: Path, model_fingerprint: str, num_layers: int) -> None:
        self._state = StateDirectory(directory)
        self._model_fingerprint = model_fingerprint
        self._num_layers = num_layers

    def path_of(self, skipped: Sequence[int]) -> Path:
        """Return where the maps of these skipped layers are kept."""
        key = healed_key(self._model_fingerprint, skipped)
        return self._state.path_of(_MAPS_KIND, key).with_suffix(".safetensors")

    def find(self, skipped: Sequence[int]) -> Path | None:
        """Return the file of kept maps; None, with a warning, where it cannot be used."""
        return self._checked(self.path_of(skipped), skipped)

    def _checked(self, path: Path, skipped: Sequence[int]) -> Path | None:
        if not path.exists():
            return None
        try:
            maps = load_maps(path)
            maps.check_model(self._model_fingerprint, self._num_layers, maps.hidden_size)
            if maps.healing is None or maps.healing.skipped != tuple(skipped):
                of = "in closed form" if maps.healing is None else list(maps.healing.skipped)
                raise RepairError(
                    f"{path}: skipped: found maps {of}, allowed: {list(skipped)}, as the levels do"
                )
        except (RepairError, OSError) as error:
            logger.warning("healed maps are not used: %s", error)
            return None
        return path

    def checkpoint_of(self, skipped: Sequence[int], training: Training) -> Path:
        """Return where the state of an unfinished training is kept."""
        key = healing_key(self._model_fingerprint, skipped, training)
        return self._state.path_of(_TRAINING_KIND, key).with_suffix(".safetensors")

    def candidate_of(self, skipped: Sequence[int], training: Training) -> Path:
        """Return where a training writes maps that are still to be judged."""
        return self.checkpoint_of(skipped, training).with_suffix(".maps.safetensors")

    def candidate(self, skipped: Sequence[int], training: Training) -> Path | None:
        """Return the maps of a finished training that were not judged; None: there are none."""
        return self._checked(self.candidate_of(skipped, training), skipped)

    def keep(self, skipped: Sequence[int], candidate: Path) -> Path:
        """Keep maps that were judged in place of earlier ones; return the file that they are in."""
        path = self.path_of(skipped)
        replace_file(path, candidate.read_bytes())
        return path

    def outcome(self, skipped: Sequence[int], training: Training) -> Outcome | None:
        """Return what this very training came to before; None: it is to be done.

        It is also where its maps are kept no longer.
        """
        key = healing_key(self._model_fingerprint, skipped, training)
        outcome = self._state.load(_TRAINING_KIND, key, JsonEntry(Outcome, key))
        if outcome is not None and not outcome.problem and self.find(skipped) is None:
            return None
        return outcome

    def save_outcome(self, skipped: Sequence[int], training: Training, outcome: Outcome) -> None:
        key = healing_key(self._model_fingerprint, skipped, training)
        self._state.save(_TRAINING_KIND, key, JsonEntry(Outcome, key), outcome)
