"""``fathom report``."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from server.cli.offline import run_offline
from server.cli.offline_options import Config, Dtype, ModelArgument, Revision, TrustRemoteCode
from server.cli.problems import report_problem
from server.config import Settings, load_settings
from server.telemetry.progress import ProgressReport


def report(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Directory of the report, new or an earlier one's.")],
    section: Annotated[
        list[str] | None,
        typer.Option(help="Section to measure; may be repeated. None: all.", metavar="NAME"),
    ] = None,
    budget_seconds: Annotated[
        float,
        typer.Option(help="Seconds after which no measurement is begun.", min=0, metavar="SECONDS"),
    ] = math.inf,
    questions: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of multiple-choice questions, JSON lines with query, choices and gold; may "
            "be repeated.",
            metavar="FILE",
        ),
    ] = None,
    num_questions: Annotated[
        int, typer.Option(help="Questions of each file, at most.", min=1, metavar="NUMBER")
    ] = 200,
    heal_steps: Annotated[
        int,
        typer.Option(
            help="Steps of each training of maps; 0: no healing.", min=0, metavar="NUMBER"
        ),
    ] = 0,
    config: Config = None,
    revision: Revision = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to rank the layers on, as for 'fathom serve'.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it.", metavar="NUMBER")
    ] = None,
    quality_text: Annotated[
        str | None, typer.Option(help="Held-out text to judge on, as for 'fathom serve'.")
    ] = None,
    quality_tokens: Annotated[
        str | None, typer.Option(help="Tokens of it.", metavar="NUMBER")
    ] = None,
    search_tokens: Annotated[
        str | None, typer.Option(help="Tokens that a search may run.", metavar="NUMBER")
    ] = None,
    dtype: Dtype = None,
    state_dir: Annotated[
        str | None,
        typer.Option(help="Directory that keeps compiled layers and hashes.", metavar="PATH"),
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
) -> None:
    """Measure the experiments of the ShortGPT paper on a model, and write a page of them.

    OUT gets index.html, which needs no network, plots/ and report.json with all numbers. What has
    been measured is kept in OUT/measurements, so that another run goes on where one was stopped.

    The settings of 'fathom serve' apply, from variables and --config, too.
    """
    settings = load_settings(
        {
            "config": config,
            "model": model,
            "revision": revision,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "quality_text": quality_text,
            "quality_tokens": quality_tokens,
            "search_tokens": search_tokens,
            "dtype": dtype,
            "state_dir": state_dir,
            "trust_remote_code": trust_remote_code,
        }
    )
    run_offline(
        settings,
        lambda: _report(
            settings,
            out,
            section or [],
            budget_seconds,
            questions or [],
            num_questions,
            heal_steps,
        ),
    )


def _report(
    settings: Settings,
    out: Path,
    sections: list[str],
    budget_seconds: float,
    questions: list[Path],
    num_questions: int,
    heal_steps: int,
) -> None:
    # Imported here to keep the other commands quick.
    from server.evaluation.multiple_choice import load_questions
    from server.model.inputs import refused_as
    from server.report.matplotlib_check import MatplotlibMissing
    from server.report.options import ReportOptions
    from server.report.report import Report

    with refused_as("questions"):
        read = {path.stem: load_questions(path, num_questions) for path in questions}
    options = ReportOptions(
        out=out,
        budget_seconds=budget_seconds,
        sections=sections,
        questions=read,
        heal_steps=heal_steps,
    )
    with ProgressReport(Console(stderr=True)) as progress:
        try:
            page = asyncio.run(Report(settings, options, progress).run())
        except MatplotlibMissing as error:
            report_problem(str(error))
            sys.exit(1)
    print(f"Written to {page}")
