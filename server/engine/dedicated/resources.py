"""How the engines of the levels divide the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from server.engine.arguments import GIB, num_cpu_threads, weight_bytes
from server.errors import FailedPrecondition

# What vLLM's process takes before weights and KV cache, with room for what it computes.
_PROCESS_BYTES = GIB


@dataclass(frozen=True, slots=True)
class Resources:
    """What one engine gets. ``num_threads`` and ``kv_cache_bytes`` are for CPUs."""

    share: float
    kv_cache_bytes: int | None = None
    num_threads: int | None = None


def divide_memory(names: list[str], shares: Mapping[str, float]) -> dict[str, float]:
    """Return the share of the memory of each of the levels ``names``.

    Levels that ``shares`` does not name have equal parts of what the others leave.

    Raises :class:`FailedPrecondition` where that is nothing.
    """
    unnamed = [name for name in names if name not in shares]
    rest = 1.0 - sum(shares[name] for name in names if name in shares)
    if unnamed and rest <= 1e-9:
        raise FailedPrecondition(
            f"memory_shares leaves nothing for the level {unnamed[0]}; name it there, too"
        )
    return {name: shares[name] if name in shares else rest / len(unnamed) for name in names}


def cpu_resources(
    checkpoint: Path, share: float, total_kv_cache_bytes: int, num_cores: int, num_levels: int
) -> Resources:
    """Return what an engine on a CPU gets: its share of the KV cache, its part of the cores.

    Raises :class:`FailedPrecondition` where the memory for it is not there.
    """
    kv_cache_bytes = int(share * total_kv_cache_bytes)
    weights = weight_bytes(checkpoint)
    needed = weights + kv_cache_bytes + _PROCESS_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise FailedPrecondition(
            f"an engine needs about {needed / GIB:.1f} GiB of memory (weights "
            f"{weights / GIB:.1f}, KV cache {kv_cache_bytes / GIB:.1f}), but "
            f"{available / GIB:.1f} GiB are available; remove a level, or set a smaller "
            "kv_cache_gib"
        )
    return Resources(
        share, kv_cache_bytes, num_cpu_threads(checkpoint, max(1, num_cores // num_levels))
    )
