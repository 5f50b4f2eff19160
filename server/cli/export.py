"""``fathom export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from server.cli.offline import run_offline
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport


def export(
    out: Annotated[Path, typer.Argument(help="New directory to write.")],
    depth: Annotated[int | None, typer.Option(help="Layers that stay.")] = None,
    prune_ratio: Annotated[
        float | None, typer.Option(help="Share of the layers that is removed.")
    ] = None,
    prefill_depth: Annotated[int | None, typer.Option(help="Refused.", hidden=True)] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Quantize the weights with GPTQ.", metavar="gptq-4bit|gptq-8bit"),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(help="As for 'fathom quantize'.", metavar="-1|32|64|128"),
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order", help="As for 'fathom quantize'.")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="What comes first; by default the model is quantized once, for all depths.",
            metavar="quantize-then-prune|prune-then-quantize",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
    config: Annotated[str | None, typer.Option(help="YAML file with settings.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for 'fathom serve'; none: the demo model."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub model.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file that says which layers are removed first.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to rank the layers on, as for 'fathom serve'.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it to rank the layers on.", metavar="NUMBER")
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(help="Directory that keeps plans and quantized models.", metavar="PATH"),
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code", help="Copy the code that comes with the model; it may run."
        ),
    ] = None,
) -> None:
    """Write a standalone checkpoint of one depth, without loading the model.

    With --quantize it is loaded, layer by layer, to be quantized.

    The plan of --plan says which layers are removed; without it, the plan that a server has
    kept for this model. If there is none, the model is loaded to rank its layers.

    The settings of 'fathom serve' apply, from variables and --config, too.
    """
    if prefill_depth is not None:
        raise typer.BadParameter(
            "--prefill-depth: a standalone checkpoint runs the same layers for the prompt and for "
            "what is generated; a server can tell them apart"
        )
    if depth is not None and prune_ratio is not None:
        raise typer.BadParameter("--depth and --prune-ratio exclude each other")
    if depth is None and prune_ratio is None:
        raise typer.BadParameter("one of --depth and --prune-ratio is needed")
    settings = load_settings(
        {
            "config": config,
            "model": model,
            "revision": revision,
            "quantize": quantize,
            "quantize_group_size": group_size,
            "quantize_act_order": act_order,
            "order": order,
            "plan": plan,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "state_dir": state_dir,
            "trust_remote_code": trust_remote_code,
        }
    )
    run_offline(settings, lambda: _export(settings, out, depth, prune_ratio, overwrite))


def _export(
    settings: Settings, out: Path, depth: int | None, prune_ratio: float | None, overwrite: bool
) -> None:
    from pruning.checkpoint import CheckpointError
    from pruning.depths import check_depth, depth_of_prune_ratio
    from pruning.fingerprint import model_fingerprint, tokenizer_fingerprint
    from pruning.plan import Plan, PlanError
    from pruning.quantization import QuantizationError, QuantizationFailed, plan_of_base
    from pruning.surgery import SurgeryError, check_output, count_layers
    from pruning.text import TextError
    from server.calibration.offline_plan import kept_plan, measured_plan
    from server.file_hashes import FileHashes
    from server.model.exporter import Exporter
    from server.model.inputs import StartError, calibration_texts, refused_as
    from server.model.source import find_model

    with refused_as("model", CheckpointError):
        source = find_model(settings.model, settings.revision)
        fingerprint = model_fingerprint(source.directory, FileHashes(settings.state_dir))
        num_layers = count_layers(source.directory)
    with refused_as("quantize", CheckpointError, QuantizationError, SurgeryError):
        exporter = Exporter(settings, source, fingerprint)
    try:
        if prune_ratio is not None:
            depth = depth_of_prune_ratio(num_layers, prune_ratio)
        assert depth is not None
        check_depth(num_layers, depth)
        check_output(out, overwrite=overwrite)
    except ValueError as error:
        raise StartError(str(error)) from error
    with ProgressReport(Console(stderr=True)) as report:
        if settings.plan is not None:
            with refused_as("plan", PlanError, OSError):
                chosen = Plan.load(settings.plan)
            with refused_as("model", QuantizationError):
                chosen = plan_of_base(chosen, source.directory, fingerprint)
        else:
            with refused_as("calibration", TextError):
                texts = calibration_texts(settings)
            with refused_as("model", CheckpointError):
                tokenizer = tokenizer_fingerprint(source.directory)
            kept = kept_plan(settings, fingerprint, tokenizer, texts)
            if kept is None:
                with refused_as("the layers cannot be ranked; --plan takes a ranking", Exception):
                    kept = measured_plan(
                        settings, source.directory, fingerprint, num_layers, texts, report
                    )
            chosen = kept
        with refused_as(f"plan: {settings.plan}", PlanError):
            chosen.check_model(fingerprint, num_layers)
        try:
            with refused_as("model", CheckpointError):
                written = exporter.write(out, chosen, depth, report.advance, overwrite=overwrite)
        except QuantizationFailed:
            raise
        except (QuantizationError, SurgeryError) as error:
            raise StartError(str(error)) from error
    removed = ", ".join(map(str, written.removed)) or "none"
    print(f"Depth {written.depth} of {written.num_layers}; layers removed: {removed}")
    print(
        f"Weights: {decimal(written.num_bytes)}, before: {decimal(written.num_source_bytes)}; "
        f"in {written.directory}"
    )
