"""``fathom heal``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.cli.offline import run_offline
from server.cli.offline_options import Config, Dtype, Model, Revision, TrustRemoteCode
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport

if TYPE_CHECKING:
    from pruning.repair import HealingStep
    from pruning.repair.healing_job import HealingReport


def heal(
    depth: Annotated[
        list[int] | None,
        typer.Option(help="Layers that run; may be repeated. None: the depths of the levels."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="What is trained: maps (default) or gated-mlp.", metavar="KIND"),
    ] = None,
    intermediate_size: Annotated[
        str | None,
        typer.Option(
            help="Hidden size of gated MLPs. None: with as many parameters as maps.",
            metavar="NUMBER",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps, each on up to 512 tokens.", metavar="NUMBER")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="Seed of the order of the text.", metavar="NUMBER")
    ] = None,
    config: Config = None,
    model: Model = None,
    revision: Revision = None,
    levels: Annotated[
        str | None, typer.Option(help="As for 'fathom serve'.", metavar="NAME=DEPTH,...")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file that says which layers are skipped first.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric of the plan that is looked for in --state-dir.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to train on, as for 'fathom serve'.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it to train on.", metavar="NUMBER")
    ] = None,
    quality_text: Annotated[
        str | None, typer.Option(help="Text to judge the result on, as for 'fathom serve'.")
    ] = None,
    quality_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it to judge on.", metavar="NUMBER")
    ] = None,
    dtype: Dtype = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Directory that keeps the result.", metavar="PATH")
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Train what stands in for the layers which a depth skips: maps, or gated MLPs.

    The dense model is what they learn from. Maps begin with those in closed form that a server has
    kept in --state-dir; if there are none, these are fitted first. Gated MLPs, one in place of each
    run of skipped layers, begin as a plain skip. The result is kept there where it is better than
    the maps in closed form on text that it was not trained on, and 'fathom serve --repair healed'
    serves it. A training that was interrupted goes on where it was.

    The settings of 'fathom serve' apply, from variables and --config, too.
    """
    settings = load_settings(
        {
            "config": config,
            "model": model,
            "revision": revision,
            "levels": levels,
            "plan": plan,
            "metric": metric,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "quality_text": quality_text,
            "quality_tokens": quality_tokens,
            "dtype": dtype,
            "state_dir": state_dir,
            "trust_remote_code": trust_remote_code,
            "heal_kind": kind,
            "heal_intermediate_size": intermediate_size,
            "heal_steps": steps,
            "heal_seed": seed,
        }
    )
    run_offline(settings, lambda: _heal(settings, depth or []))


def _heal(settings: Settings, depths: Sequence[int]) -> None:
    from server.calibration.healed_store import HEALED_NAMES
    from server.model.offline_healing import OfflineHealing

    with ProgressReport(Console(stderr=True)) as progress:
        healing = OfflineHealing(settings, progress)
        for skipped in healing.skipped_layers(depths):
            name = f"{healing.num_layers - len(skipped)} of {healing.num_layers} layers"
            print(f"Depth {name}; layers skipped: {', '.join(map(str, skipped))}")
            done = healing.done_before(skipped)
            if done is not None:
                print(f"Trained before: {done.problem or f'kept in {healing.path_of(skipped)}'}")
                continue
            report, problem = healing.heal(skipped, _shown(progress, f"Healing {name}"))
            Console().print(_table(report, HEALED_NAMES[settings.heal_kind]))
            if problem:
                print(f"Not kept, because it is not better on held-out text: {problem}")
            else:
                print(f"Kept in {healing.path_of(skipped)}")


def _shown(progress: ProgressReport, what: str) -> Any:
    def on_step(step: HealingStep) -> None:
        progress.advance(what, step.step, step.num_steps)

    return on_step


def _table(report: HealingReport, healed: str) -> Table:
    """Return a table of the quality on held-out text; ``healed`` is what was trained."""
    table = Table("On held-out text", "Perplexity", "KL", "Agreement")
    for name, quality in (
        ("dense", report.dense),
        ("skipped", report.plain),
        ("closed form", report.closed_form),
        (healed, report.healed),
    ):
        if quality is not None:
            kl, agreement = quality.kl_nats or 0.0, quality.agreement or 0.0
            table.add_row(
                name, f"{quality.perplexity:.4g}", f"{kl:.3f}", f"{100 * agreement:.1f} %"
            )
    return table
