"""Settings of quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.checkpoint import read_config
from pruning.quantization.errors import QuantizationError

BITS = (4, 8)
# Supported by vLLM's kernels; -1: one group for each row.
GROUP_SIZES = (128, 64, 32, -1)
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """GPTQ's settings.

    ``group_size`` weights of a row share a scale; -1: all of a row, None: the largest number
    that fits the model. ``act_order`` quantizes the columns with the largest activations first; the
    groups stay as they are, so it costs nothing when the model runs. Without it, the groups are
    ordered by activations, and the columns within each group.

    Raises :class:`QuantizationError`, naming the field, for values that are not allowed.
    """

    bits: int = 4
    group_size: int | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            allowed = ", ".join(map(str, BITS))
            raise QuantizationError(f"bits: got {self.bits!r}, allowed: {allowed}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, sorted(GROUP_SIZES)))
            raise QuantizationError(f"group_size: got {self.group_size!r}, allowed: {allowed}")


def check_not_quantized(directory: str | Path) -> None:
    """Raise :class:`QuantizationError` for a checkpoint that is quantized already."""
    directory = Path(directory)
    method = quantization_method(read_config(directory))
    if method is None and any((directory / name).is_file() for name in _OLD_CONFIGS):
        method = "as its quantize_config.json says"
    if method is not None:
        raise QuantizationError(
            f"{directory}: is quantized already ({method}), allowed: a checkpoint that is not"
        )


def quantization_method(config: dict[str, Any]) -> str | None:
    """Return gptq, awq, ..., None for the configuration of a model that is not quantized."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(rules := section.get("quantization_config"), dict):
            return str(rules.get("quant_method", "unknown"))
    return None
