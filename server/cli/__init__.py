"""The ``fathom`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from server.cli.bench import bench
from server.cli.calibrate import calibrate
from server.cli.evaluate import evaluate
from server.cli.export import export
from server.cli.generate import generate
from server.cli.heal import heal
from server.cli.health import health
from server.cli.model import model
from server.cli.own_text import own_text
from server.cli.problems import report_problem
from server.cli.quantize import quantize
from server.cli.report import report
from server.cli.serve import serve
from server.config import ConfigError
from server.rpc.client import CallError

app = typer.Typer(
    help="LLM inference with a depth dial.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve,
    generate,
    model,
    calibrate,
    own_text,
    export,
    quantize,
    heal,
    report,
    health,
):
    app.command()(command)
app.command("eval")(evaluate)
# Its benchmarks have commands and options of their own.
app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        from server.version import VERSION

        print(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; exit code 1 if a call failed, 2 if the arguments or settings are wrong."""
    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            report_problem(problem)
        sys.exit(2)
    except CallError as error:
        report_problem(str(error))
        sys.exit(1)
    except BrokenPipeError:  # the program that reads the output has stopped
        sys.stderr.close()
        sys.exit(1)
