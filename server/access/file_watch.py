"""Detection of changed files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

# Inode, time of modification in nanoseconds and size; None for a file that does not exist.
_Version = tuple[int, int, int] | None


class FileWatch:
    """Looks at files regularly, and reports a change once they have stopped changing.

    Files that belong together, such as a certificate and its key, are seldom written at the same
    moment, so a change is reported when the next look finds no further change. Links are followed,
    so the replaced volume of a Kubernetes secret is a change as well.
    """

    def __init__(self, files: Callable[[], Iterable[Path]], on_change: Callable[[], None]) -> None:
        self._files = files
        self._on_change = on_change
        self._known = self._latest = self._versions()

    async def run(self, seconds: float = 1.0) -> None:
        """Look every ``seconds``, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            self.look()

    def look(self) -> None:
        """Look once; call ``on_change`` if the last look found a change and this one no other."""
        before, self._latest = self._latest, self._versions()
        if self._latest != self._known and self._latest == before:
            self._known = self._latest
            self._on_change()

    def forget(self) -> None:
        """Treat the files as they are now as known."""
        self._known = self._latest = self._versions()

    def _versions(self) -> dict[Path, _Version]:
        return {path: _version(path) for path in self._files()}


def _version(path: Path) -> _Version:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
