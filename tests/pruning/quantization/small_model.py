"""A few layers of the demo model: real weights that are quantized in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pruning.quantization import QuantizationSettings, Quantized, quantize_checkpoint
from pruning.surgery import export_checkpoint
from server.model.source import DEMO_MODEL
from tests.pruning.surgery.exporting import plan_of

NUM_LAYERS = 3
TEXT_FINGERPRINT = "sha256:text"

runs_quantized = pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()),
    reason="vLLM has its kernel for GPTQ on a CPU with AVX-512 alone",
)


def small_model(directory: Path) -> Path:
    """Write the first, the second and the last layer of the demo model."""
    plan = plan_of(DEMO_MODEL, tuple(range(2, 15)))
    return export_checkpoint(DEMO_MODEL, directory, plan, NUM_LAYERS).directory


def windows(num_windows: int = 4, length: int = 128) -> list[list[int]]:
    return [[(7 * i + 31 * n) % 2000 for i in range(length)] for n in range(num_windows)]


def quantize(
    model: Path,
    out: Path,
    settings: QuantizationSettings | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
    **options: object,
) -> Quantized:
    return quantize_checkpoint(
        model,
        out,
        settings or QuantizationSettings(),
        token_ids or windows(),
        text_fingerprint=TEXT_FINGERPRINT,
        **options,  # type: ignore[arg-type]
    )
