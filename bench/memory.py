"""Peak memory of processes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import psutil

_INTERVAL_SECONDS = 0.02


def unique_mib(processes: Iterable[psutil.Process]) -> float:
    """Return the memory that would become free if these processes ended, in MiB."""
    return sum(process.memory_full_info().uss for process in processes) / 2**20


class PeakMemory:
    """Samples the resident memory of some processes, in bytes, while the context is open."""

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self._processes = list(processes)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = self.peak = 0

    def __enter__(self) -> Self:
        self.before = self.peak = self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())

    @property
    def added(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self.peak = max(self.peak, self._read())

    def _read(self) -> int:
        total = 0
        for process in self._processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total
