"""A fleet on paper: replicas, depth, or both against the load of a production trace."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import typer

from bench.fleet_simulation import (
    FleetOptions,
    MeasuredLevel,
    Outcome,
    Strategy,
    Trace,
    simulate,
)
from bench.options import Options, option
from bench.plots import save_lines
from bench.session import Session
from server.cli.connection import Connection, connected

STRATEGIES = (
    Strategy("fixed", scales=False, changes_depth=False),
    Strategy("replicas alone", scales=True, changes_depth=False),
    Strategy("depth alone", scales=False, changes_depth=True),
    Strategy("replicas and depth", scales=True, changes_depth=True),
)
# Loads that are plotted, as shares of the one that is asked for.
_LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class FleetBenchOptions(Options):
    trace: str = option(
        "", "CSV file with TIMESTAMP, ContextTokens and GeneratedTokens of each request."
    )
    replicas: int = option(1000, "Replicas at the beginning, and at least.")
    load: float = option(0.75, "Mean work of the trace, as a share of what they do at full depth.")
    speedup: float = option(1.0, "How much faster the trace is replayed than it was recorded.")
    prompt_cost: float = option(0.05, "What a prompt's token costs, in generated tokens.")
    start_seconds: int = option(180, "Time until a new replica serves.")
    target_seconds: float = option(5.0, "Longest time in the queue that users accept.")
    hold_seconds: int = option(30, "Time without load until the next deeper level.")
    max_quality_loss: float = option(
        0.25, "Largest loss of a level that load may lead to: perplexity ratio to dense, minus 1."
    )

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        for name in ("replicas", "load", "speedup", "target_seconds"):
            if not getattr(self, name) > 0:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: more than 0")
        for name in ("prompt_cost", "start_seconds", "hold_seconds", "max_quality_loss"):
            if not getattr(self, name) >= 0:
                raise typer.BadParameter(f"--{name.replace('_', '-')}: allowed: 0 or more")


def run(options: FleetBenchOptions, connection: Connection) -> None:
    measure(options, connection)


def measure(options: FleetBenchOptions, connection: Connection) -> Session:
    """Take speed and quality of the levels from a running server, and simulate each strategy."""
    trace = read_trace(options)
    name, levels, streams = _levels(options, connection)
    session = Session("fleet", options, {"name": name})
    fleet = FleetOptions(
        options.replicas,
        streams,
        float(trace.work.mean()),
        options.start_seconds,
        options.target_seconds,
        options.hold_seconds,
    )
    for share in _LOADS:
        loaded = scaled(trace, options.load * share, levels[0], options.replicas)
        for strategy in STRATEGIES:
            outcome = simulate(loaded, levels, strategy, fleet)
            row = {"strategy": strategy.name, "load": options.load * share, **asdict(outcome)}
            session.add_round(row)
            if share == 1.0:
                session.report.summary.append(_summary(strategy, outcome))
    shown = ", ".join(f"{each.depth} layers: {each.tokens_per_second:.0f}" for each in levels)
    session.report.notes.append(
        f"{len(trace.arrivals)} requests in {trace.seconds} s; tokens per second of a replica: "
        f"{shown}"
    )
    session.finish(lambda stem: _plot(session, stem))
    return session


def read_trace(options: FleetBenchOptions) -> Trace:
    """Return the trace as it is to be replayed; raise typer.BadParameter for a file that is none.

    Work is in generated tokens, prompts included at their cost.
    """
    if not options.trace:
        raise typer.BadParameter("--trace: got nothing, allowed: a CSV file")
    try:
        with Path(options.trace).open(newline="", encoding="utf-8") as file:
            rows = [
                (
                    datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp(),
                    float(row["GeneratedTokens"])
                    + options.prompt_cost * float(row["ContextTokens"]),
                )
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise typer.BadParameter(f"--trace: {options.trace}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise typer.BadParameter(
            f"--trace: {options.trace} is no such file: {type(error).__name__} {error}"
        ) from None
    if len(rows) < 2:
        raise typer.BadParameter(f"--trace: {options.trace} has fewer than two requests")
    times, work = np.array(sorted(rows)).T
    return Trace((times - times[0]) / options.speedup, work)


def scaled(trace: Trace, load: float, dense: MeasuredLevel, replicas: int) -> Trace:
    """Return the trace as so many times its users would make it.

    Its mean work is then a share ``load`` of what the replicas do at full depth.
    """
    wanted = load * replicas * dense.tokens_per_second * trace.seconds
    return Trace(trace.arrivals, trace.work * (wanted / trace.work.sum()))


def _levels(
    options: FleetBenchOptions, connection: Connection
) -> tuple[str, list[MeasuredLevel], int]:
    """Return the model's name, the levels that load may lead to, and the streams of a replica."""
    with connected(connection) as client:
        model = client.get_model()
    # Only the speed of generated tokens is known, which a prompt at a depth of its own leaves as it
    # is.
    measured = [
        level
        for level in model.levels
        if level.HasField("speed") and level.prefill_layers == level.decode_layers
    ]
    measured.sort(key=lambda level: -level.decode_layers)
    if not measured or not all(level.HasField("quality") for level in measured):
        raise typer.BadParameter("the server has not measured speed and quality of its levels")
    most = measured[0].quality.perplexity * (1 + options.max_quality_loss)
    allowed = [
        MeasuredLevel(level.decode_layers, level.speed.tokens_per_second, level.quality.agreement)
        for level in measured
        if level is measured[0] or level.quality.perplexity <= most
    ]
    return model.name, allowed, measured[0].speed.num_streams


def _summary(strategy: Strategy, outcome: Outcome) -> dict[str, object]:
    return {
        "strategy": strategy.name,
        "replica_hours": round(outcome.replica_hours, 1),
        "most_replicas": outcome.most_replicas,
        "within_target": round(outcome.within_target, 4),
        "wait_p99_s": round(outcome.wait_p99, 2),
        "mean_depth": round(outcome.mean_depth, 2),
        "mean_agreement": round(outcome.mean_agreement, 4),
    }


def _plot(session: Session, stem: Path) -> None:
    lines: dict[str, dict[float, float]] = {strategy.name: {} for strategy in STRATEGIES}
    for row in session.report.rounds:
        if not math.isnan(row["within_target"]):
            lines[row["strategy"]][row["load"]] = 100 * row["within_target"]
    save_lines(
        stem,
        lines,
        x_label="mean load, as a share of what the first replicas do at full depth",
        y_label="requests within the target, %",
        title=session.title,
    )
