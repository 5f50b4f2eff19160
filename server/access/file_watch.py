"""Notices when files change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

# What tells one version of a file from another; None for one that is not there.
_Version = tuple[int, int, int] | None


class FileWatch:
    """Looks at files again and again.

    Files that belong together, such as a certificate and its key, are seldom written at once:
    a change counts when a second look finds nothing new. Links are followed, so that the
    replaced volume of a Kubernetes secret is a change, too.
    """

    def __init__(self, files: Callable[[], Iterable[Path]], on_change: Callable[[], None]) -> None:
        self._files = files
        self._on_change = on_change
        self._known = self._latest = self._versions()

    async def run(self, seconds: float = 1.0) -> None:
        """Look every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            self.look()

    def look(self) -> None:
        """Look once; ``on_change`` is called for what was new last time and still is the same."""
        before, self._latest = self._latest, self._versions()
        if self._latest != self._known and self._latest == before:
            self._known = self._latest
            self._on_change()

    def forget(self) -> None:
        """Take the files as they are now for known."""
        self._known = self._latest = self._versions()

    def _versions(self) -> dict[Path, _Version]:
        return {path: _version(path) for path in self._files()}


def _version(path: Path) -> _Version:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
