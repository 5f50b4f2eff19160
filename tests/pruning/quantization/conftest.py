from __future__ import annotations

from pathlib import Path

import pytest

from tests.pruning.quantization.small_model import quantize, small_model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real layers."""
    return small_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_quantized(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits."""
    return quantize(small, tmp_path_factory.mktemp("quantized") / "model").directory
