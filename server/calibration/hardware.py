"""The hardware that a measured speed depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUS = Path("/proc/cpuinfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


def describe_hardware() -> dict[str, object]:
    """Return the processors that this process may use, by model and number."""
    return {
        "processor": _first(_CPUS, "model name") or platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpus": sorted(_first(file, "Model") for file in _GPUS.glob("*/information")),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def _first(file: Path, field: str) -> str:
    """Return the value of the first line ``field: value``; empty where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")
