"""Moving memory into huge pages, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SIZE = 16 << 20
SCRIPT = f"""
import json, mmap, os
from pathlib import Path
import numpy as np
from server.engine.huge_pages import use_huge_pages

def resident(array):
    start = array.ctypes.data
    found, sizes = False, {{"Rss": 0, "AnonHugePages": 0}}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            first, last = (int(part, 16) for part in name.split("-"))
            found = first < start + {SIZE} and start < last
        elif found and name.rstrip(":") in sizes:
            sizes[name.rstrip(":")] += int(rest.split()[0]) << 10
    return sizes

def numbers(advice):
    memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)  # neighbours of other advice stay regions of their own
    return np.frombuffer(memory, np.int64)

advices = mmap.MADV_DODUMP, mmap.MADV_DONTDUMP, mmap.MADV_DODUMP
used, shared, unused = map(numbers, advices)
used[:] = shared[:] = np.arange({SIZE} // 8)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.close(writing)
    os.read(reading, 1)  # holds what both have until the other has ended
    os._exit(0)
used[:] = np.arange({SIZE} // 8)  # now it is this process's own
before = resident(unused)
moved = use_huge_pages()
print(json.dumps({{
    "moved": moved,
    "again": use_huge_pages(),
    "used": resident(used),
    "shared": resident(shared),
    "unused": [before["Rss"], resident(unused)["Rss"]],
    "intact": bool((used == shared).all()),
}}))
os.close(writing)
os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=60
    )
    result: dict[str, Any] = json.loads(done.stdout)
    if result["moved"] == 0:
        pytest.skip("this kernel does not move memory into huge pages (MADV_COLLAPSE, Linux 6.1)")
    return result


def test_memory_in_use_is_moved_and_stays_as_it_was(found: dict[str, Any]) -> None:
    # But for what lies in blocks that it shares with its neighbours.
    assert found["used"]["AnonHugePages"] >= SIZE - 2 * (2 << 20)
    assert found["intact"]


def test_memory_of_two_processes_is_left_alone(found: dict[str, Any]) -> None:
    assert found["shared"]["AnonHugePages"] <= 2 * (2 << 20)


def test_memory_that_was_never_written_takes_none(found: dict[str, Any]) -> None:
    before, after = found["unused"]
    assert after - before <= 2 * (2 << 20)
