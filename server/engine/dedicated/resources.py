"""Resources of the machine, divided among the engines of the levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pruning.weights import weight_bytes
from server.engine.arguments import GIB, num_cpu_threads
from server.errors import FailedPrecondition

# Memory of vLLM's process apart from weights and KV cache.
_PROCESS_BYTES = GIB


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of one engine. ``num_threads`` and ``kv_cache_bytes`` are set for CPUs only."""

    share: float
    kv_cache_bytes: int | None = None
    num_threads: int | None = None


def divide_memory(names: list[str], shares: Mapping[str, float]) -> dict[str, float]:
    """Return the share of the memory of each of the levels ``names``.

    Levels that are not in ``shares`` get equal parts of the rest.

    Raises :class:`FailedPrecondition` if there is no rest for them.
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
    """Return the resources of an engine on a CPU: its share of the KV cache and of the cores.

    Raises :class:`FailedPrecondition` if the machine has too little memory left.
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
