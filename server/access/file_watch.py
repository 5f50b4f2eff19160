"""File watches: files are read again when they change, and while their content is invalid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from server.errors import FathomError

# Inode, time of modification in nanoseconds and size; None for a file that does not exist.
FileVersion = tuple[int, int, int] | None

logger = logging.getLogger(__name__)


class FileWatch:
    """Looks at files regularly, and has them read once they have changed.

    Files that belong together, such as a certificate and its key, are seldom written at the same
    moment, so a change is read when the next look finds no further change. Links are followed,
    so the replaced volume of a Kubernetes secret is a change as well.

    If reading fails, the problem is logged, and every further look reads again: a certificate may
    become valid, and a change may go unseen where the clock of a file system is coarse.
    """

    def __init__(
        self, files: Callable[[], Iterable[Path]], read: Callable[[], None], name: str = "files"
    ) -> None:
        """``read`` applies the content of ``files``, or raises :class:`FathomError`.

        ``name`` names the files in the log.
        """
        self._files = files
        self._read = read
        self._name = name
        self._problem = ""
        self._known = self._latest = self._versions()

    @property
    def problem(self) -> str:
        """What is wrong with the files as they are now; empty if nothing is."""
        return self._problem

    def look(self) -> None:
        """Look once; read files that had changed at the last look and have not changed since."""
        before, self._latest = self._latest, self._versions()
        is_due = self._latest == before and (self._latest != self._known or self._problem)
        if is_due and self.read_now():
            logger.info("%s have been read again", self._name)

    def read_now(self) -> bool:
        """Read the files as they are now; return whether they are in force."""
        self._known = self._latest = self._versions()
        try:
            self._read()
        except FathomError as error:
            if str(error) != self._problem:
                logger.error(
                    "%s; what was read before stays in force, and the file is tried again", error
                )
            self._problem = str(error)
            return False
        self._problem = ""
        return True

    def _versions(self) -> dict[Path, FileVersion]:
        return {path: file_version(path) for path in self._files()}


def file_version(path: Path) -> FileVersion:
    """Return what changes when the file is written or replaced; links are followed."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
