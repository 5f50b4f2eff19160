"""A server in a process of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil

from bench.machine import processes_of

# A start may compile a model, but never takes longer than this.
_START_SECONDS = 1200.0
_STOP_SECONDS = 30.0


class ServerFailed(Exception):
    """A server that ended or was not ready in time."""


class ServerProcess:
    """A command that serves; at the end it is stopped with all processes that it has started."""

    def __init__(self, command: Sequence[object], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.spawned = time.perf_counter()
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # The command alone decides what is measured, not variables of this process.
                env={name: v for name, v in os.environ.items() if not name.startswith("FATHOM_")},
            )

    def processes(self) -> list[psutil.Process]:
        try:
            return processes_of(psutil.Process(self._process.pid))
        except psutil.NoSuchProcess:
            return []

    async def wait_until(
        self, ready: Callable[[], Awaitable[bool]], interval: float = 0.1
    ) -> float:
        """Return the seconds from the start until ``ready``; raises :class:`ServerFailed`."""
        while not await ready():
            seconds = time.perf_counter() - self.spawned
            if self._process.poll() is not None or seconds > _START_SECONDS:
                text = self._log.read_text("utf-8", "replace")
                raise ServerFailed(f"the server does not serve; it wrote:\n{text[-4000:]}")
            await asyncio.sleep(interval)
        return time.perf_counter() - self.spawned

    def close(self) -> None:
        processes = self.processes()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in psutil.wait_procs(processes, timeout=5.0)[1]:
            child.kill()
