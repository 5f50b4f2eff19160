"""Measurements on a model that transformers has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pruning.decoder import find_decoder
from pruning.metrics import DensePass, measure_dense_pass
from pruning.quality import Quality, measure_quality
from pruning.quantization.dequantized import with_dequantized
from pruning.sublayers import (
    Part,
    SublayerInfluence,
    measure_part_quality,
    measure_sublayer_influence,
)
from pruning.transformers_model import batches
from server.engine.base import LayerSelection, ProgressCallback

Windows = Sequence[Sequence[int]]


class TransformersMeter:
    """A model that transformers has loaded; all of a window but its first token is predicted."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def dense_pass(self, windows: Windows, progress: ProgressCallback) -> DensePass:
        return measure_dense_pass(self._model, self._batches(windows, progress))

    def sublayer_influence(self, windows: Windows, progress: ProgressCallback) -> SublayerInfluence:
        return measure_sublayer_influence(self._model, self._batches(windows, progress))

    def part_qualities(self, windows: Windows, layer: int) -> dict[Part, Quality]:
        """Return the quality without each part of ``layer``."""
        return measure_part_quality(self._model, self._tensors(windows), layer)

    def qualities(self, windows: Windows, selections: Sequence[LayerSelection]) -> list[Quality]:
        """Measure selections that have one depth and no maps."""
        skipped = [layers.decode_skips for layers in selections]
        return measure_quality(self._model, self._tensors(windows), skipped)

    def quality(
        self,
        windows: Windows,
        skipped: Sequence[int],
        quantized: Path | None = None,
        *,
        of_depth: bool = False,
    ) -> Quality:
        """Return the quality without the layers ``skipped``.

        ``quantized`` is a checkpoint whose weights the model computes with, and what it is compared
        with is itself with all layers; ``of_depth``: it lacks these layers.
        """
        num_layers = len(find_decoder(self._model).layers)
        layers = [layer for layer in range(num_layers) if layer not in set(skipped)]
        weights = (
            nullcontext()
            if quantized is None
            else with_dequantized(self._model, quantized, layers if of_depth else None)
        )
        with weights:
            return measure_quality(self._model, self._tensors(windows), [tuple(skipped)])[0]

    def _tensors(self, windows: Windows) -> list[Any]:
        import torch

        return [torch.tensor(list(window), device=self._model.device) for window in windows]

    def _batches(self, windows: Windows, progress: ProgressCallback) -> Any:
        return batches(windows, self._model.device, progress)
