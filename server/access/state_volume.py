"""What the volume of the state directory does not allow: writing, more data, or exec."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

# Less than the compiled layers of one model take.
_MIN_FREE_BYTES = 4 << 20

logger = logging.getLogger(__name__)


def state_volume_problem(directory: Path) -> str:
    """Return what is wrong with the volume, as one line; empty if nothing is.

    A directory that does not exist yet is judged by the nearest one above it.
    """
    existing = next(
        (path for path in (directory, *directory.absolute().parents) if path.exists()), Path("/")
    )
    if not existing.is_dir():
        return f"state_dir: {existing} is not a directory, so nothing is kept for the next start"
    try:
        volume = os.statvfs(existing)
        can_be_written = os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        return f"state_dir: {directory} cannot be looked at ({error.strerror})"
    problems = []
    if volume.f_flag & os.ST_RDONLY:
        problems.append("is on a read-only volume, so nothing is kept for the next start")
    elif not can_be_written:
        problems.append(f"cannot be written by user {os.geteuid()}, so nothing is kept")
    elif (free := volume.f_bavail * volume.f_frsize) < _MIN_FREE_BYTES:
        problems.append(f"is on a full volume ({free} bytes are free), so not everything is kept")
    if volume.f_flag & os.ST_NOEXEC:
        problems.append("is on a volume that forbids exec, so no compiled code is kept in it")
    return f"state_dir: {directory} {'; it '.join(problems)}" if problems else ""


class StateVolume:
    """Looks at the volume of the state directory, and logs what is wrong with it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Empty while nothing is wrong.
        self.problem = ""

    def look(self) -> None:
        """Look once. It may take long where the volume is on a network."""
        before, self.problem = self.problem, state_volume_problem(self._directory)
        if self.problem != before:
            if self.problem:
                logger.warning("%s", self.problem)
            else:
                logger.info("state_dir: %s can be used again", self._directory)

    async def follow(self, seconds: float = 30.0) -> None:
        """Look every ``seconds``, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.to_thread(self.look)
