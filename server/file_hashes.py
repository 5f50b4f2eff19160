"""Hashes of large files, computed once and kept in the state directory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pruning.fingerprint import file_sha256
from server.state import JsonEntry, StateDirectory
from server.state_keys import hash_key

# File systems give equal times to changes that are closer together, some of them by this much.
# What was changed so lately could be changed once more without a trace.
_SETTLED_SECONDS = 2.0
# Smaller files are read in no time.
_MIN_BYTES = 64 << 20
_KIND = "hash"


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What differs once a file has been changed or replaced; times are in nanoseconds.

    The time of the last change of an inode cannot be set, so it tells a file from one that has
    replaced it with an equal size and an equal time of modification.
    """

    num_bytes: int
    modified: int
    changed: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStatus:
        """Return the status of a file, or of the one it links to; raises :class:`OSError`."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)


@dataclass(frozen=True, slots=True)
class KeptHash:
    """The SHA-256 of a file, in hexadecimal, and what the file was when it was computed."""

    status: FileStatus
    sha256: str


class FileHashes:
    """Returns SHA-256 hashes of files; fit for any thread.

    A file is read again once its size, its times or its inode differ. So a start need not read
    all of the weights, and sees every change of them all the same.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state = StateDirectory(state_dir)

    def __call__(self, path: Path) -> str:
        """Return the hash, in hexadecimal; raises :class:`OSError` for what cannot be read."""
        status = FileStatus.of(path)
        if status.num_bytes < _MIN_BYTES:
            return file_sha256(path)
        key = hash_key(path)
        entry = JsonEntry(KeptHash, key)
        kept = self._state.load(_KIND, key, entry)
        if kept is not None and kept.status == status:
            return kept.sha256
        digest = file_sha256(path)
        is_settled = time.time() - status.changed / 1e9 > _SETTLED_SECONDS
        if is_settled and FileStatus.of(path) == status:
            self._state.save(_KIND, key, entry, KeptHash(status, digest))
        return digest
