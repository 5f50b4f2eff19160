"""Progress of long work: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

# The least time between two log lines about the same work.
LOG_SECONDS = 10.0

logger = logging.getLogger(__name__)


class ProgressReport:
    """One bar for each piece of work; to be used as a context manager."""

    def __init__(self, console: Console) -> None:
        self._bars = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[str, float] = {}

    def __enter__(self) -> ProgressReport:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show work whose length is not known."""
        started = time.monotonic()
        if self._bars is None:
            logger.info("%s", what)
            yield
            logger.info("%s: done in %.1f s", what, time.monotonic() - started)
            return
        task = self._tasks[what] = self._bars.add_task(what, total=None)
        yield
        self._bars.update(task, total=1, completed=1)

    def advance(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` is done."""
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        if done == total or now - self._logged.setdefault(what, 0.0) >= LOG_SECONDS:
            logger.info("%s: %d %%", what, 100 * done // total if total else 100)
            self._logged[what] = now
