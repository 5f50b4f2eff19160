"""``fathom export``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from server.cli.offline import run_offline
from server.cli.offline_options import Config, Model, Revision
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport

if TYPE_CHECKING:
    from pruning.collapse import CollapsedModel
    from pruning.repair.folding import FoldedRepair

_SKIP, _LINEAR_PATCH, _LACO = _METHODS = ("skip", "linear-patch", "laco")

logger = logging.getLogger(__name__)


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
    config: Config = None,
    model: Model = None,
    revision: Revision = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file that says which layers are removed first.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to rank the layers on, as for 'fathom serve'.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it to rank the layers on.", metavar="NUMBER")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What the layers are ranked by, as for 'fathom serve'; none: whatever a kept "
            "plan was made by."
        ),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="folded: fit maps that stand in for the removed layers, and fold them into the "
            "weights.",
            metavar="none|folded",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="skip: nothing stands in for the removed layers but what --repair folds in. "
            "linear-patch: a Hadamard rotation, scales and the rotation back, folded into the "
            "MLP before each gap. laco: LaCo chooses the layers, and merges them into others.",
            metavar="skip|linear-patch|laco",
        ),
    ] = _SKIP,
    quality_text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure the perplexity with --repair or --method on, as for serve."
        ),
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
    if repair not in (None, "none", "folded"):
        raise typer.BadParameter(f"--repair: got {repair!r}, allowed: none, folded{_why(repair)}")
    if method not in _METHODS:
        raise typer.BadParameter(f"--method: got {method!r}, allowed: {', '.join(_METHODS)}")
    if repair == "folded" and method != _SKIP:
        raise typer.BadParameter(
            f"--method {method} and --repair folded exclude each other: both change the weights "
            "for the same removed layers"
        )
    if metric is not None and method == _LACO:
        raise typer.BadParameter("--metric and --method laco exclude each other: LaCo chooses")
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
            "metric": metric,
            "quality_text": quality_text,
            "state_dir": state_dir,
            "trust_remote_code": trust_remote_code,
        }
    )
    method = "folded" if repair == "folded" else method
    run_offline(settings, lambda: _export(settings, out, depth, prune_ratio, overwrite, method))


def _why(repair: str | None) -> str:
    """Return why what the engine does instead of skipped layers is not among what is allowed."""
    if repair != "closed-form":
        return ""
    return (
        "; the maps of the server turn the whole residual stream x into x + x M, which no weight "
        "of a standard checkpoint does. Those of folded act on what the layer before adds"
    )


def _export(
    settings: Settings,
    out: Path,
    depth: int | None,
    prune_ratio: float | None,
    overwrite: bool,
    method: str,
) -> None:
    from pruning.checkpoint import CheckpointError
    from pruning.collapse import CollapseError
    from pruning.depths import check_depth, depth_of_prune_ratio
    from pruning.fingerprint import model_fingerprint, tokenizer_fingerprint
    from pruning.plan import Plan, PlanError
    from pruning.quality import QualityError
    from pruning.quantization import QuantizationError, QuantizationFailed, plan_of_base
    from pruning.repair import RepairError
    from pruning.repair.folding import FoldMethod
    from pruning.surgery import SurgeryError, check_output, count_layers
    from pruning.text import TextError
    from server.calibration.offline_collapse import collapsed_model
    from server.calibration.offline_fold import fitted_folds
    from server.calibration.offline_plan import kept_plan, measured_plan
    from server.file_hashes import FileHashes
    from server.model.exporter import Exporter
    from server.model.inputs import (
        StartError,
        calibration_texts,
        held_out_texts,
        refused_as,
    )
    from server.model.source import find_model

    if settings.quantize is not None and method != _SKIP:
        name = "repair" if method == "folded" else "method"
        raise StartError(
            f"{name}: got {method} with quantize {settings.quantize}, allowed: {method} alone; "
            "'fathom quantize' takes the checkpoint that is written"
        )
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
        if method != _SKIP:
            _check_method(source.directory, method)
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
                texts = calibration_texts(settings, source.directory)
            with refused_as("model", CheckpointError):
                tokenizer = tokenizer_fingerprint(source.directory)
            # LaCo chooses the layers itself, so any ranking will do.
            metric = "block_influence" if method == _LACO else settings.metric
            is_given = "metric" in settings.model_fields_set and method != _LACO
            wanted = metric if is_given else None
            kept = kept_plan(settings, fingerprint, tokenizer, texts, wanted)
            if kept is None:
                if method != _LACO:
                    _check_needs_no_engine(settings)
                with refused_as("the layers cannot be ranked; --plan takes a ranking", Exception):
                    kept = measured_plan(
                        settings,
                        source.directory,
                        fingerprint,
                        num_layers,
                        texts,
                        report,
                        metric,
                    )
            chosen = kept
        with refused_as(f"plan: {settings.plan}", PlanError):
            chosen.check_model(fingerprint, num_layers)
        repair, collapse = None, None
        if method != _SKIP:
            with refused_as("calibration", TextError):
                fitted_on = calibration_texts(settings, source.directory)
                measured_on = held_out_texts(settings)
        if method == _LACO:
            with refused_as("layers cannot be merged", CollapseError, QualityError, ValueError):
                collapse = collapsed_model(
                    settings, source.directory, depth, fitted_on, measured_on, report
                )
            chosen = chosen.removing_first(collapse.collapse.removed)
        elif method != _SKIP:
            with refused_as("repair cannot be fitted", RepairError, ValueError, OSError):
                repair = fitted_folds(
                    settings,
                    source.directory,
                    chosen.skipped(depth),
                    fitted_on,
                    measured_on,
                    report,
                    FoldMethod(method),
                )
        try:
            with refused_as("model", CheckpointError), refused_as("repair", RepairError):
                written = exporter.write(
                    out,
                    chosen,
                    depth,
                    report.advance,
                    overwrite=overwrite,
                    repair=repair,
                    collapse=collapse,
                )
        except QuantizationFailed:
            raise
        except (QuantizationError, SurgeryError) as error:
            raise StartError(str(error)) from error
    removed = ", ".join(map(str, written.removed)) or "none"
    if settings.repair not in ("auto", "none") and method == _SKIP:
        logger.warning(
            "repair: %s is not exported%s; --repair folded folds others into the weights",
            settings.repair,
            _why(settings.repair),
        )
    print(f"Depth {written.depth} of {written.num_layers}; layers removed: {removed}")
    if repair is not None:
        _print_repair(repair, written.removed)
    if collapse is not None:
        _print_collapse(collapse)
    print(
        f"Weights: {decimal(written.num_bytes)}, before: {decimal(written.num_source_bytes)}; "
        f"in {written.directory}"
    )


def _check_method(directory: Path, method: str) -> None:
    """Raise :class:`ValueError` where the method cannot change the exported weights."""
    from pruning.checkpoint import read_config
    from pruning.collapse import check_mergeable
    from pruning.repair.folding import check_foldable
    from pruning.repair.hadamard import check_rotation

    config = read_config(directory)
    if method == _LACO:
        check_mergeable(config)
        return
    check_foldable(config)
    if method == _LINEAR_PATCH and isinstance(size := config.get("hidden_size"), int):
        check_rotation(size)


def _check_needs_no_engine(settings: Settings) -> None:
    """Refuse to rank by a metric that only a server can search for."""
    from server.calibration.served_metrics import SERVED_METRICS, searches
    from server.model.inputs import StartError

    if searches(settings.metric):
        others = ", ".join(name for name in SERVED_METRICS if not searches(name))
        raise StartError(
            f"metric: got {settings.metric!r}, allowed: {others}; {settings.metric} searches with "
            f"the engine, and {settings.state_dir} has no plan by it of this model and text. "
            f"'fathom serve --metric {settings.metric}' makes one; --plan takes a plan file"
        )


def _print_collapse(model: CollapsedModel) -> None:
    found = model.collapse
    merged = "; ".join(
        f"{', '.join(map(str, taken))} into {layer}"
        for layer, taken in sorted(found.merged.items())
    )
    print(f"Layers merged: {merged or 'none'}")
    print(
        f"Similarity to the dense model's last states: {found.similarity:.3f}, threshold of the "
        f"last merge: {found.threshold:.2f}"
    )
    print(
        f"Perplexity: {model.perplexity:.2f}, without the merges {model.plain_perplexity:.2f}, "
        f"with all layers {model.dense_perplexity:.2f}; on {model.num_held_out_tokens} tokens"
    )


def _print_repair(repair: FoldedRepair, removed: Collection[int]) -> None:
    folded = ", ".join(str(fold.layer) for fold in repair.folds) or "none"
    print(f"Repair folded into the MLPs of the layers: {folded}")
    covered = {layer for fold in repair.folds for layer in fold.removed}
    if plain := sorted({*removed} - covered):
        print(
            f"Nothing stands in for the layers {', '.join(map(str, plain))}: no layer is before "
            "them"
        )
    print(
        f"Perplexity: {repair.perplexity:.2f}, without repair {repair.plain_perplexity:.2f}, with "
        f"all layers {repair.dense_perplexity:.2f}; on {repair.num_held_out_tokens} tokens"
    )
