"""Checkpoints of single depths, kept in the state directory."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

from pruning.checkpoint import CheckpointError
from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
from pruning.surgery.companions import companions_fingerprint
from server.errors import FailedPrecondition
from server.file_hashes import FileHashes
from server.state import EntryFormat, JsonEntry, StateDirectory, StateError
from server.state_keys import checkpoint_key

_KIND = "checkpoint"


@dataclass(frozen=True, slots=True)
class _ExportEntry(EntryFormat[str]):
    """The fingerprint of an exported checkpoint; loading it compares it with the checkpoint.

    It is written after the checkpoint, so a checkpoint without it is unfinished.
    """

    directory: Path
    json: JsonEntry[str]
    hashes: FileHashes

    def load(self, path: Path) -> str:
        fingerprint = self.json.load(path)
        try:
            found = model_fingerprint(self.directory, self.hashes)
        except (CheckpointError, OSError) as error:
            raise StateError(f"{self.directory}: {error}") from error
        if found != fingerprint:
            raise StateError(f"{self.directory}: is not what was exported there")
        return fingerprint

    def save(self, value: str, path: Path) -> None:
        self.json.save(value, path)


class CheckpointStore:
    """Checkpoints of one model, by the layers that they leave out."""

    def __init__(
        self, state_dir: Path, source: Path, source_name: str, fingerprint: str, *, with_code: bool
    ) -> None:
        self._state = StateDirectory(state_dir)
        self._hashes = FileHashes(state_dir)
        self._source = source
        self._source_name = source_name
        self._fingerprint = fingerprint
        self._with_code = with_code

    async def checkpoint(self, plan: Plan, skipped: tuple[int, ...]) -> Path:
        """Return a checkpoint without the ``skipped`` layers of ``plan``; make it if none is kept.

        Without skipped layers that is the source itself. If several servers need the same
        checkpoint, one makes it. Raises :class:`FailedPrecondition` if it cannot be made.
        """
        if not skipped:
            return self._source
        key = checkpoint_key(
            model=self._fingerprint,
            removed=skipped,
            companions=companions_fingerprint(self._source, with_code=self._with_code),
            with_code=self._with_code,
        )
        path = self._state.path_of(_KIND, key).with_suffix("")
        entry = _ExportEntry(path, JsonEntry(str, key), self._hashes)
        depth = plan.num_layers - len(skipped)
        try:
            await self._state.load_or_make(
                _KIND, key, entry, lambda: asyncio.to_thread(self._export, plan, depth, path)
            )
        except (OSError, ValueError) as error:  # ValueError: the base of pruning's errors
            raise FailedPrecondition(
                f"a checkpoint of depth {depth} cannot be made: {error}"
            ) from error
        return path

    def _export(self, plan: Plan, depth: int, path: Path) -> str:
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        export_checkpoint(
            self._source,
            path,
            plan,
            depth,
            base_model=self._source_name,
            with_code=self._with_code,
            file_hash=self._hashes,
        )
        return model_fingerprint(path)
