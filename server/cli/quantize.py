"""``fathom quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from server.cli.offline import run_offline
from server.cli.offline_options import Config, Revision
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport


def quantize(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, smollm2 or Hugging Face Hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="New directory to write.")],
    bits: Annotated[str, typer.Option(help="Bits of a weight.", metavar="4|8")] = "4",
    group_size: Annotated[
        str | None,
        typer.Option(
            help="Weights of a row that share a scale, -1: all of them; by default the largest "
            "that fits the model.",
            metavar="-1|32|64|128",
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order", help="Quantize the columns with the largest activations first."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier quantization.")
    ] = False,
    config: Config = None,
    revision: Revision = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on, as for 'fathom serve'.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it to calibrate on.", metavar="NUMBER")
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code", help="Run the code that comes with the model, and copy it."
        ),
    ] = None,
) -> None:
    """Write a checkpoint with weights of 4 or 8 bits, quantized with GPTQ.

    The settings of 'fathom serve' apply, from variables and --config, too.
    """
    settings = load_settings(
        {
            "config": config,
            "model": model,
            "revision": revision,
            "quantize": f"gptq-{bits}bit",
            "quantize_group_size": group_size,
            "quantize_act_order": act_order,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "trust_remote_code": trust_remote_code,
        }
    )
    run_offline(settings, lambda: _quantize(settings, out, overwrite))


def _quantize(settings: Settings, out: Path, overwrite: bool) -> None:
    from pruning.checkpoint import CheckpointError
    from pruning.fingerprint import text_fingerprint
    from pruning.quantization import QuantizationError, QuantizationFailed, quantize_checkpoint
    from pruning.surgery import SurgeryError
    from pruning.text import TextError
    from server.model.inputs import StartError, calibration_texts, refused_as
    from server.model.quantized import (
        calibration_windows,
        checked_quantization,
        warn_if_not_served_here,
    )
    from server.model.source import find_model

    with refused_as("model", CheckpointError, QuantizationError, SurgeryError):
        source = find_model(settings.model, settings.revision)
        quantization = checked_quantization(settings, source.directory)
    assert quantization is not None
    with refused_as("calibration", TextError):
        texts = calibration_texts(settings, source.directory)
    with refused_as("calibration", TextError), refused_as("model", CheckpointError):
        windows = calibration_windows(settings, source.directory, texts)
        warn_if_not_served_here(quantization, source.directory)
    is_local = source.directory == Path(settings.model or "").expanduser()
    with ProgressReport(Console(stderr=True)) as report:
        try:
            with refused_as("model", CheckpointError):
                written = quantize_checkpoint(
                    source.directory,
                    out,
                    quantization,
                    windows,
                    text_fingerprint=text_fingerprint(texts),
                    base_model=None if is_local else source.name,
                    overwrite=overwrite,
                    with_code=settings.trust_remote_code,
                    on_progress=lambda *layers: report.advance("Quantizing the layers", *layers),
                )
        except QuantizationFailed:
            raise
        except (QuantizationError, SurgeryError) as error:
            raise StartError(str(error)) from error
    size = "a row" if written.settings.group_size == -1 else written.settings.group_size
    print(f"GPTQ, {written.settings.bits} bits, groups of {size}")
    print(
        f"Weights: {decimal(written.num_bytes)}, before: {decimal(written.num_source_bytes)}; "
        f"in {written.directory}"
    )
