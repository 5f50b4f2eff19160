"""The order of pruning and quantization."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pruning.checkpoint import read_config
from pruning.fingerprint import FileHash, file_sha256, model_fingerprint
from pruning.plan import Plan
from pruning.quantization.checkpoint import (
    OnLayers,
    absolute,
    check_quantizable,
    num_bytes_needed,
    quantize_into,
)
from pruning.quantization.settings import QuantizationSettings
from pruning.quantization.worker_process import Stop
from pruning.surgery import PLAN_FILE, Export, check_output, export_checkpoint
from pruning.surgery.model_config import num_layers_of
from pruning.surgery.output_directory import check_space, output_directory
from pruning.weights import weight_bytes


class Order(enum.StrEnum):
    """Which comes first; the results differ (Men et al., arXiv 2403.03853, table 5)."""

    QUANTIZE_THEN_PRUNE = "quantize-then-prune"
    PRUNE_THEN_QUANTIZE = "prune-then-quantize"


def prune_then_quantize(
    source: str | Path,
    out: str | Path,
    plan: Plan,
    depth: int,
    settings: QuantizationSettings,
    windows: Sequence[Sequence[int]],
    *,
    text_fingerprint: str,
    base_model: str | None = None,
    overwrite: bool = False,
    with_code: bool = False,
    on_progress: OnLayers | None = None,
    stop: Stop | None = None,
    file_hash: FileHash = file_sha256,
) -> Export:
    """Write ``depth`` layers of the model in ``source``, quantized without the others, to ``out``.

    GPTQ compensates, layer by layer, for the change of a layer's inputs by quantization. Here
    these are the inputs in the pruned model, so each depth is quantized anew. The other order
    is an export (:mod:`pruning.surgery`) of a model that has been quantized once.

    Arguments and errors are those of :func:`pruning.surgery.export_checkpoint` and
    :func:`pruning.quantization.quantize_checkpoint`.
    """
    source, out = Path(source), absolute(out)
    settings = check_quantizable(source, settings)
    num_layers = num_layers_of(read_config(source))
    base_model = base_model or source.resolve().name
    check_output(out, overwrite=overwrite)
    check_space(out, weight_bytes(source) + num_bytes_needed(source, settings))
    with output_directory(out, replaceable_with=PLAN_FILE if overwrite else None) as directory:
        pruned = directory / "pruned"
        written = export_checkpoint(
            source,
            pruned,
            plan,
            depth,
            base_model=base_model,
            with_code=with_code,
            file_hash=file_hash,
        )
        quantize_into(
            directory,
            pruned,
            settings,
            windows,
            text_fingerprint=text_fingerprint,
            base_model=base_model,
            with_code=with_code,
            on_progress=on_progress,
            stop=stop,
            base_fingerprint=model_fingerprint(pruned),
            pruned_from=num_layers,
        )
        shutil.rmtree(pruned)
    return replace(written, directory=out, num_bytes=weight_bytes(out))
