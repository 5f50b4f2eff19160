"""Huge pages for this process's memory, on Linux.

Every step reads all weights. With pages of 4 KiB the processor spends a good part of that time
looking up addresses. Memory is moved into huge pages once the model is loaded. Asking for them
from the beginning would also affect imported modules and memory that forked processes share, and
a start would take seconds longer.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HUGE = 2 << 20
_ENTRIES = _HUGE // mmap.PAGESIZE
# linux/mman.h
_MADV_COLLAPSE = 25
# Bits of /proc/self/pagemap: the page is present, and no other process maps it. Moving such pages
# takes no additional memory. See Documentation/admin-guide/mm/pagemap.rst of the kernel.
_OWN = np.uint64(1 << 63 | 1 << 56)


def use_huge_pages() -> int:
    """Move memory that is in use and not shared into huge pages; return the number of bytes.

    0 where the kernel cannot do it (before Linux 6.1).
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, stop in _own_memory():
        for address in range(start, stop, _HUGE):
            # One at a time: if the kernel finds no room for one, it may for the next.
            if madvise(address, _HUGE, _MADV_COLLAPSE) == 0:
                moved += _HUGE
    return moved


def _own_memory() -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of aligned memory that only this process maps, in whole huge pages."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for start, stop in _anonymous_regions():
            start, stop = -(-start // _HUGE) * _HUGE, stop // _HUGE * _HUGE
            if stop <= start:
                continue
            pagemap.seek(start // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read((stop - start) // mmap.PAGESIZE * 8), np.uint64)
            own = ((entries & _OWN) == _OWN).reshape(-1, _ENTRIES).all(axis=1)
            edges = np.flatnonzero(np.diff(np.concatenate(([False], own, [False]))))
            for first, last in edges.reshape(-1, 2).tolist():
                yield start + first * _HUGE, start + last * _HUGE


def _anonymous_regions() -> list[tuple[int, int]]:
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and (not name or name == ["[heap]"]):
            start, _, stop = addresses.partition("-")
            regions.append((int(start, 16), int(stop, 16)))
    return regions
