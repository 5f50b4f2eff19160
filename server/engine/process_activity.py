"""Activity of processes, read from /proc."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

_PROC = Path("/proc")
# Fields of /proc/PID/task/TID/stat behind the name, which ends with the last parenthesis.
_STATE, _MAJOR_FAULTS, _USER_TICKS, _SYSTEM_TICKS = 0, 9, 11, 12
_STOPPED = "T"
_WAITS_FOR_DEVICE = "D"


class Counters(NamedTuple):
    """Resources that processes have used since their start; a change is a sign of life."""

    cpu_ticks: int
    # Pages that had to be read from a disk.
    major_faults: int
    # Read from disks or written to them.
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessActivity:
    """Activity of some processes, with all of their threads, at one moment."""

    counters: Counters
    # Whether a process has been stopped by a signal.
    is_stopped: bool
    # How many threads wait for a disk or another device, and cannot even be killed meanwhile.
    num_waiting_for_device: int

    def has_worked_since(self, before: ProcessActivity) -> bool:
        """Return whether there is a sign that the processes make progress."""
        return self.num_waiting_for_device > 0 or self.counters != before.counters

    def __str__(self) -> str:
        text = (
            f"{self.counters.cpu_ticks} ticks of processor time, {self.counters.major_faults} "
            f"major page faults and {self.counters.num_bytes} bytes from and to disks so far"
        )
        if self.num_waiting_for_device:
            text += f"; {self.num_waiting_for_device} threads wait for a disk or another device"
        return text


def activity_of(processes: Iterable[psutil.Process]) -> ProcessActivity:
    """Return the activity of the processes; those that have ended count for nothing."""
    ticks = faults = num_bytes = num_waiting = 0
    is_stopped = False
    for process in processes:
        directory = _PROC / str(process.pid)
        num_bytes += _disk_bytes(directory)
        for fields in _threads(directory):
            ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
            faults += int(fields[_MAJOR_FAULTS])
            num_waiting += fields[_STATE] == _WAITS_FOR_DEVICE
            is_stopped |= fields[_STATE] == _STOPPED
    return ProcessActivity(Counters(ticks, faults, num_bytes), is_stopped, num_waiting)


def _threads(directory: Path) -> list[list[str]]:
    found = []
    with suppress(OSError):
        for thread in (directory / "task").iterdir():
            with suppress(OSError):  # the thread has ended meanwhile
                text = (thread / "stat").read_text(encoding="utf-8", errors="replace")
                found.append(text.rpartition(")")[2].split())
    return found


def _disk_bytes(directory: Path) -> int:
    """Return the bytes from and to disks; 0 where the kernel does not tell."""
    total = 0
    with suppress(OSError):
        for line in (directory / "io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("read_bytes", "write_bytes"):
                total += int(value)
    return total
