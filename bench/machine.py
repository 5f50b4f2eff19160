"""What a measurement ran on, and what else ran there."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

import psutil

from server.calibration.hardware import describe_hardware
from server.calibration.versions import measuring_versions


def describe_machine() -> dict[str, object]:
    """Return the processors, memory and system of this machine."""
    return {
        **describe_hardware(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def describe_versions() -> dict[str, str]:
    return measuring_versions()


def processes_of(root: psutil.Process) -> list[psutil.Process]:
    """Return the process and all below it that are still there."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Return the CPU time that these processes have used so far."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class ForeignLoad:
    """How busy the machine is with what does not belong to this benchmark."""

    def __init__(self) -> None:
        self._before = self._read()

    def share(self) -> float:
        """Return the share of all processors' time since the last call that went to others."""
        busy, own, total = (
            now - then for now, then in zip(self._read(), self._before, strict=True)
        )
        self._before = self._read()
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(times[:8])  # what follows is in user time already
        idle = times.idle + getattr(times, "iowait", 0.0)
        here = psutil.Process()
        ended = here.cpu_times()  # children that have ended are counted with their parent
        own = cpu_seconds(processes_of(here)) + ended.children_user + ended.children_system
        return total - idle, own, total
