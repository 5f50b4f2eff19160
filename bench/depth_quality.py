"""What each depth costs in quality: by metric, without repair, with it, and healed.

Perplexity on texts that neither ranking nor repair has seen, divided by that of the dense model,
the divergence from it, how the depth writes and chooses, and the accuracy on multiple-choice
questions, all in one engine.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from bench.healing import Trainer
from bench.measuring_engine import engine_windows, measured_model, measuring_engine
from bench.options import Options, names, option, pruned_depths
from bench.plots import save_lines
from bench.session import Session
from bench.texts import given_texts, held_out_texts
from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan
from pruning.probes import Probes
from pruning.quality import Quality
from pruning.text import TextError
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.probes import Prober
from server.calibration.served_metrics import SERVED_METRICS, searches
from server.engine.base import LayerSelection
from server.engine.elastic.engine import ElasticEngine
from server.errors import InvalidArgument
from server.evaluation.multiple_choice import Question, accuracy, load_questions
from server.model.demo_corpus import Part
from server.telemetry.progress import ProgressReport

_SHARES = (0.9, 0.8, 2 / 3)
_NAMES = {"block_influence": "BI", "greedy_kl": "greedy", "single_removal_kl": "single removal"}


@dataclass(frozen=True)
class DepthQualityOptions(Options):
    depths: str = option("", "Depths; none: 0.9, 0.8 and two thirds of the layers.")
    metrics: str = option("block_influence", "What the layers are ranked by, one or more metrics.")
    plain: bool = option(True, "Whether each is measured without repair.")
    repair: bool = option(True, "Whether each is measured with repair, too.")
    heal_steps: int = option(0, "Steps that the maps of each depth are trained; 0: none.")
    prompt_only: bool = option(True, "Whether pruning of the prompt alone is measured, too.")
    probes: bool = option(True, "Whether writing and choosing are measured, too.")
    calibration: str = option(
        "", "Text to rank and fit on; none: the documentation of Python's standard library."
    )
    calibration_tokens: int = option(16384, "Tokens of it.")
    search_tokens: int = option(524288, "Tokens that a search for layers may run.")
    texts: str = option(
        "", "Files of held-out text; none: a part of that documentation that was not ranked on."
    )
    text_tokens: int = option(4096, "Tokens of each held-out text.")
    questions: str = option("", "Files of multiple-choice questions, as JSON lines; none: none.")
    num_questions: int = option(500, "Questions of each file, at most.")


def run(options: DepthQualityOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: DepthQualityOptions) -> Session:
    metrics = names(options.metrics, "--metrics", SERVED_METRICS)
    try:
        source = measured_model(options)
        calibration = given_texts(options.calibration, Part.CALIBRATION, options.calibration_tokens)
        held_out = held_out_texts(options.texts, options.text_tokens)
        questions = {
            Path(each).stem: load_questions(Path(each), options.num_questions)
            for each in filter(None, options.questions.split(","))
        }
    except (InvalidArgument, TextError) as error:
        raise typer.BadParameter(str(error)) from None
    if not options.plain and not options.repair:
        raise typer.BadParameter("--no-plain: allowed: with --repair")
    if options.heal_steps and not options.repair:
        raise typer.BadParameter("--heal-steps: maps are trained from those of --repair")
    engine = measuring_engine(options, source)
    session = Session("depth_quality", options, {"name": source.title, "dtype": options.dtype})
    with session.progress as progress, tempfile.TemporaryDirectory() as directory:
        with progress.working("Starting the engine"):
            await engine.start()
        try:
            num_layers = engine.model.num_layers
            depths = pruned_depths(
                options.depths, num_layers, (round(num_layers * share) for share in _SHARES)
            )
            calibrator = Calibrator(
                engine,
                model_fingerprint=model_fingerprint(source.directory),
                versions={},
                texts=calibration,
                max_tokens=options.calibration_tokens,
                held_out_texts=[text for texts in held_out.values() for text in texts],
                max_held_out_tokens=options.text_tokens,
                every_depth=False,
                search_tokens=options.search_tokens,
            )

            def report(work: Progress) -> None:
                progress.advance(work.phase.capitalize(), work.done, work.total)

            maps_file = Path(directory) / "maps.safetensors"
            repair = None
            if options.repair:
                await calibrator.fit_repair(engine, maps_file, report)
                repair = await engine.install_repair(maps_file)
            trainer = Trainer(
                model=source.directory,
                dtype=options.dtype,
                closed_form=maps_file,
                windows=engine_windows(engine, calibration, options.calibration_tokens),
                steps=options.heal_steps,
                seed=options.seed,
                output=Path(directory),
            )
            rows: dict[tuple[str, int], LayerSelection] = {("dense", num_layers): LayerSelection()}
            for metric in metrics:
                # Only what a search finds depends on the maps.
                counts_on = repair if searches(metric) and not options.plain else None
                plan = await calibrator.measure_plan(report, metric=metric, repair=counts_on)
                if options.plain:
                    rows |= _rows(plan, metric, depths, None, options.prompt_only)
                if repair is not None:
                    if options.plain and searches(metric):
                        plan = await calibrator.measure_plan(report, metric=metric, repair=repair)
                    rows |= _rows(plan, metric, depths, repair, options.prompt_only)
                for depth in depths if options.heal_steps else ():
                    name = f"{_NAMES.get(metric, metric)} + healed"
                    skipped = tuple(sorted(plan.skipped(depth)))
                    path = await asyncio.to_thread(
                        trainer.train, skipped, f"{name}, depth {depth}", progress
                    )
                    healed = await engine.install_repair(path)
                    rows[name, depth] = LayerSelection(skipped, skipped, healed)
            windows = {
                name: engine_windows(engine, texts, options.text_tokens)
                for name, texts in held_out.items()
            }
            start = engine.tokenize("")
            pieces = [window[len(start) :] for each in windows.values() for window in each]
            prober = Prober(engine, pieces, start) if options.probes else None
            await _measure(session, engine, rows, windows, prober, questions)
        finally:
            await engine.shutdown()
    _summarize(session, list(windows), list(questions))
    session.directory.mkdir(parents=True, exist_ok=True)
    (session.directory / "depth_quality.md").write_text(_markdown(session), "utf-8")
    session.finish(lambda stem: _plot(session, stem))
    return session


def _rows(
    plan: Plan, metric: str, depths: Sequence[int], repair: str | None, prompt_only: bool
) -> dict[tuple[str, int], LayerSelection]:
    name = _NAMES.get(metric, metric) + (" + repair" if repair else "")
    rows = {}
    for depth in depths:
        skipped = tuple(sorted(plan.skipped(depth)))
        rows[name, depth] = LayerSelection(skipped, skipped, repair)
        if prompt_only:
            rows[f"{name}, prompt only", depth] = LayerSelection(skipped, (), repair)
    return rows


async def _measure(
    session: Session,
    engine: ElasticEngine,
    rows: dict[tuple[str, int], LayerSelection],
    windows: dict[str, list[list[int]]],
    prober: Prober | None,
    questions: dict[str, list[Question]],
) -> None:
    progress = session.progress
    qualities: dict[str, list[Quality]] = {}
    for name, of_text in windows.items():
        qualities[name] = await engine.measure_quality(
            of_text, list(rows.values()), _advance(progress, f"Perplexity, {name}")
        )
    probes: list[Probes] = []
    if prober is not None:
        probes = await prober.run(
            list(rows.values()), _advance(progress, "Writing and choosing"), has_dense=True
        )
    for number, ((name, depth), layers) in enumerate(rows.items()):
        row: dict[str, Any] = {"method": name, "depth": depth, "layers": asdict(layers)}
        for text, measured in qualities.items():
            row[f"text {text}"] = asdict(measured[number])
        if probes:
            row["probes"] = asdict(probes[number])
        session.add_round(row)
    for row, ((name, depth), layers) in zip(session.report.rounds, rows.items(), strict=True):
        for file, of_file in questions.items():
            what = f"{file}, {name}, depth {depth}"
            found = await accuracy(engine, of_file, layers, _advance(progress, what))
            row[f"questions {file}"] = asdict(found)
        session.save()


def _advance(progress: ProgressReport, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress.advance(what, done, total)


def _summarize(session: Session, texts: Sequence[str], questions: Sequence[str]) -> None:
    dense, *_ = session.report.rounds
    for row in session.report.rounds:
        summary: dict[str, Any] = {"depth": row["depth"], "method": row["method"]}
        ratios, divergences = [], []
        for text in texts:
            perplexity = row[f"text {text}"]["perplexity"]
            summary[f"perplexity_{text}"] = perplexity
            ratios.append(perplexity / dense[f"text {text}"]["perplexity"])
            divergences.append(row[f"text {text}"]["kl_nats"])
        summary["of_dense"] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        summary["kl_nats"] = math.fsum(divergences) / len(divergences)
        _summarize_probes(summary, row.get("probes", {}))
        for file in questions:
            found = row[f"questions {file}"]
            summary[file] = f"{found['share']:.1%} ± {found['stderr']:.1%}"
        session.report.summary.append(summary)
    session.report.notes.append(
        "of dense: the geometric mean over the texts of perplexity / that of the dense model; "
        "writing: perplexity of what the depth writes under the dense model / that of what dense "
        "writes; repeats: share of 4-grams that were there before; choosing: the true one of four "
        "continuations; questions: accuracy by log-likelihood per character, and its standard error"
    )


def _summarize_probes(summary: dict[str, Any], probes: dict[str, Any]) -> None:
    if writing := probes.get("writing"):
        summary["writing"] = writing["ratio"]
        summary["repeats"] = f"{writing['repeated_share']:.0%}"
    if choosing := probes.get("choosing"):
        summary["choosing"] = f"{choosing['accuracy']:.0%} ± {choosing['accuracy_stderr']:.0%}"


def _markdown(session: Session) -> str:
    """Return the summary as a table for a document."""
    rows = session.report.summary
    headings = [name.replace("_", " ") for name in rows[0]]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{session.report.command}`", ""])


def _plot(session: Session, stem: Path) -> None:
    lines: dict[str, dict[float, float]] = {}
    dense, *others = session.report.summary
    for row in others:
        line = lines.setdefault(row["method"], {float(dense["depth"]): 1.0})
        line[float(row["depth"])] = row["of_dense"]
    save_lines(
        stem,
        lines,
        x_label="depth",
        y_label="perplexity / dense",
        title=session.title,
        log_y=True,
    )
