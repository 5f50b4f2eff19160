"""The machine of a measurement, and how busy other programs kept it."""

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
    """Return the process and its descendants, as far as they are still alive."""
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
    """The share of the machine that other programs use."""

    def __init__(self) -> None:
        self._before = self._read()

    def share(self) -> float:
        """Return the share of all processors' time since the last call that other programs used."""
        busy, own, total = (
            now - then for now, then in zip(self._read(), self._before, strict=True)
        )
        self._before = self._read()
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(times[:8])  # the fields after these are already in user time
        idle = times.idle + getattr(times, "iowait", 0.0)
        here = psutil.Process()
        ended = here.cpu_times()  # ended children count as part of their parent
        own = cpu_seconds(processes_of(here)) + ended.children_user + ended.children_system
        return total - idle, own, total
