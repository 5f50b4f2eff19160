"""The commands of ``fathom bench``."""

from __future__ import annotations

import logging
import sys

import typer

from bench import (
    bystander,
    calibration,
    depth_quality,
    export_methods,
    faces,
    fleet,
    healing_kinds,
    mixed,
    norms,
    parallel,
    peers,
    profile,
    repair,
    stability,
    startup,
    throughput,
)
from bench.options import command
from bench.subjects.server_process import ServerFailed
from pruning.collapse import CollapseError
from pruning.quality import QualityError
from pruning.repair import RepairError
from pruning.text import TextError
from server.cli.connection import with_connection
from server.cli.problems import report_problem
from server.report.matplotlib_check import MatplotlibMissing
from server.rpc.client import CallError

app = typer.Typer(
    help="Measure speed, and what stands between it and its limits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("throughput")(with_connection(command(throughput.ThroughputOptions, throughput.run)))
app.command("peers")(command(peers.PeersOptions, peers.run))
app.command("http")(command(faces.FaceOptions, faces.run))
app.command("mixed")(command(mixed.MixedOptions, mixed.run))
app.command("calibration")(command(calibration.CalibrationOptions, calibration.run))
app.command("depth-quality")(command(depth_quality.DepthQualityOptions, depth_quality.run))
app.command("export-methods")(command(export_methods.ExportMethodsOptions, export_methods.run))
app.command("repair")(command(repair.RepairOptions, repair.run))
app.command("healing-kinds")(command(healing_kinds.HealingKindsOptions, healing_kinds.run))
app.command("norms")(command(norms.NormsOptions, norms.run))
app.command("stability")(command(stability.StabilityOptions, stability.run))
app.command("startup")(command(startup.StartupOptions, startup.run))
app.command("parallel")(command(parallel.ParallelOptions, parallel.run))
app.command("bystander")(command(bystander.BystanderOptions, bystander.run))
app.command("fleet")(with_connection(command(fleet.FleetBenchOptions, fleet.run)))
app.command("profile")(command(profile.ProfileOptions, profile.run))


# What comes of too little text.
_NOT_MEASURABLE = (CollapseError, QualityError, RepairError, TextError)


def run(arguments: list[str]) -> None:
    """Run one benchmark; exit with code 0 whatever it finds, 1 if it could not measure."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("server.telemetry.progress").setLevel(logging.INFO)
    try:
        app(args=arguments, prog_name="fathom bench")
    except (CallError, MatplotlibMissing, ServerFailed, *_NOT_MEASURABLE) as error:
        report_problem(str(error))
        sys.exit(1)
