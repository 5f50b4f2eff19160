"""What was trained for skipped layers of one model, kept in the state directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pruning.durable import replace_file
from pruning.repair import GatedMlps, HealingKind, RepairError, load_stand_ins, summarize_maps
from server.state import JsonEntry, StateDirectory
from server.state_keys import healed_key, healing_key

_MAPS_KIND = "healed"
_TRAINING_KIND = "healing"

HEALING_KINDS: tuple[HealingKind, ...] = get_args(HealingKind)
# What the log calls them.
HEALED_NAMES: dict[HealingKind, str] = {"maps": "healed maps", "gated-mlp": "gated MLPs"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training has come to.

    ``problem`` says what was not better on held-out text; empty: its result was kept.
    """

    problem: str


@dataclass(frozen=True, slots=True)
class Training:
    """All that the result of a training depends on, but for the model and the layers.

    ``tokens`` is the fingerprint of the token ids to train on, ``started_from`` that of the
    closed-form maps that it begins with or is compared with, ``held_out`` that of the token ids
    that the result is judged on. ``intermediate_size`` is that of MLPs; None: that with which they
    have as many parameters as maps.
    """

    tokens: str
    held_out: str
    started_from: str
    dtype: str
    steps: int
    seed: int
    kind: HealingKind = "maps"
    intermediate_size: int | None = None


class HealedStore:
    """The files of healed maps and gated MLPs, and of unfinished trainings.

    There is one of maps and one of MLPs for each set of skipped layers.
    """

    def __init__(self, directory: Path, model_fingerprint: str, num_layers: int) -> None:
        self._state = StateDirectory(directory)
        self._model_fingerprint = model_fingerprint
        self._num_layers = num_layers

    def path_of(self, skipped: Sequence[int], kind: HealingKind = "maps") -> Path:
        """Return where what was trained for these skipped layers is kept."""
        key = healed_key(self._model_fingerprint, skipped, kind)
        return self._state.path_of(_MAPS_KIND, key).with_suffix(".safetensors")

    def find(self, skipped: Sequence[int], kind: HealingKind = "maps") -> Path | None:
        """Return the file of what is kept; None, with a warning, where it cannot be used."""
        return self._checked(self.path_of(skipped, kind), skipped, kind)

    def _checked(self, path: Path, skipped: Sequence[int], kind: HealingKind) -> Path | None:
        if not path.exists():
            return None
        try:
            found = load_stand_ins(path)
            found.check_model(self._model_fingerprint, self._num_layers, found.hidden_size)
            found_kind: HealingKind = "gated-mlp" if isinstance(found, GatedMlps) else "maps"
            if found_kind != kind:
                raise RepairError(f"{path}: kind: found {found_kind}, allowed: {kind}")
            if found.healing is None or found.healing.skipped != tuple(skipped):
                of = "in closed form" if found.healing is None else list(found.healing.skipped)
                what = HEALED_NAMES[kind].split()[-1]
                raise RepairError(
                    f"{path}: skipped: found {what} {of}, allowed: {list(skipped)}, as the levels "
                    "do"
                )
        except (RepairError, OSError) as error:
            logger.warning("%s are not used: %s", HEALED_NAMES[kind], error)
            return None
        return path

    def checkpoint_of(self, skipped: Sequence[int], training: Training) -> Path:
        """Return where the state of an unfinished training is kept."""
        key = healing_key(self._model_fingerprint, skipped, training)
        return self._state.path_of(_TRAINING_KIND, key).with_suffix(".safetensors")

    def candidate_of(self, skipped: Sequence[int], training: Training) -> Path:
        """Return where a training writes its result, which is still to be judged."""
        return self.checkpoint_of(skipped, training).with_suffix(".maps.safetensors")

    def candidate(self, skipped: Sequence[int], training: Training) -> Path | None:
        """Return the result of a finished training that was not judged; None: there is none."""
        return self._checked(self.candidate_of(skipped, training), skipped, training.kind)

    def keep(self, skipped: Sequence[int], candidate: Path) -> Path:
        """Keep what was judged in place of earlier ones of its kind; return the file it is in."""
        kind = summarize_maps(candidate).healing_kind
        assert kind is not None, "it comes from a training"
        path = self.path_of(skipped, kind)
        replace_file(path, candidate.read_bytes())
        return path

    def outcome(self, skipped: Sequence[int], training: Training) -> Outcome | None:
        """Return what this very training came to before; None: it is to be done.

        It is also where its result is kept no longer.
        """
        key = healing_key(self._model_fingerprint, skipped, training)
        outcome = self._state.load(_TRAINING_KIND, key, JsonEntry(Outcome, key))
        if outcome is None or outcome.problem or self.find(skipped, training.kind) is not None:
            return outcome
        return None

    def save_outcome(self, skipped: Sequence[int], training: Training, outcome: Outcome) -> None:
        key = healing_key(self._model_fingerprint, skipped, training)
        self._state.save(_TRAINING_KIND, key, JsonEntry(Outcome, key), outcome)
