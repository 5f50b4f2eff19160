"""Hashes of large files, computed once and kept in the state directory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pruning.fingerprint import file_sha256
from server.state import JsonEntry, StateDirectory
from server.state_keys import hash_key

# Two changes of a file within this time may get equal times from the file system. The hash of a
# file that was changed more recently is not kept, because another change might go unnoticed.
_SETTLED_SECONDS = 2.0
# Hashes of smaller files are not kept: reading these takes no time.
_MIN_BYTES = 64 << 20
_KIND = "hash"


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The status of a file, which changes when the file does; times are in nanoseconds.

    ``changed``, the time of the inode's last change, cannot be set by a program. It reveals a file
    that was replaced by one of the same size and modification time.
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
    """The SHA-256 of a file, in hexadecimal, and the file's status when it was computed."""

    status: FileStatus
    sha256: str


class FileHashes:
    """SHA-256 hashes of files, usable from any thread.

    A file is read again only when its size, times or inode have changed. So a start need not read
    all of the weights, and still notices every change.
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
