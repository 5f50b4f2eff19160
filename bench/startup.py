"""The time of a server's start, cold and warm.

A cold start has an empty state directory; a warm start is the next one, with what the first left
there. Files are in the page cache in both cases.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.models import prepare_model
from bench.options import Options, option
from bench.plots import save_bars
from bench.report import Target
from bench.session import Session
from bench.statistics import Spread
from bench.subjects.base import free_port
from bench.subjects.server_process import ServerProcess
from server.rpc.client import CallError, Client

COLD_TARGET_SECONDS = 30.0
WARM_TARGET_SECONDS = 20.0


@dataclass(frozen=True)
class StartupOptions(Options):
    model: str = option("demo", "random, demo, or a checkpoint directory.")
    rounds: int = option(3, "How often a cold start and a warm one are measured.")


def run(options: StartupOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: StartupOptions) -> Session:
    model = prepare_model(options)
    description = model.describe("the server's choice")
    session = Session("startup", options, description)
    with session.progress as progress:
        for number in range(options.rounds):
            with tempfile.TemporaryDirectory() as state:
                for position, start in enumerate(("cold", "warm")):
                    seconds = await _start(options, model.directory, Path(state))
                    session.add_round({"start": start, "round": number, **seconds})
                    done = 2 * number + position + 1
                    progress.advance("Starting", done, 2 * options.rounds)
    for start in ("cold", "warm"):
        of_start = [each for each in session.report.rounds if each["start"] == start]
        phases = list(dict.fromkeys(name for each in of_start for name in each["phases"]))
        row: dict[str, Any] = {"start": start}
        for name in ("listening", "serving"):
            row[f"{name}_s"] = statistics.median(each[name] for each in of_start)
        for phase in phases:
            row[f"{phase}_s"] = statistics.median(each["phases"].get(phase, 0) for each in of_start)
        session.report.summary.append(row)
        bound = COLD_TARGET_SECONDS if start == "cold" else WARM_TARGET_SECONDS
        spread = Spread.of([each["serving"] for each in of_start])
        session.report.targets.append(
            Target.of(f"{start} start to SERVING", spread, "<=", bound, "s")
        )
    session.finish(lambda stem: _plot(session, stem))
    return session


async def _start(options: StartupOptions, directory: Path, state: Path) -> dict[str, Any]:
    """Start a server as an operator would, stop it, and return the times of the start."""
    port = free_port()
    command: list[object] = [
        *(Path(sys.executable).parent / "fathom", "serve", "--port", port),
        *("--metrics-port", free_port(), "--state-dir", state),
    ]
    if options.model != "demo":
        command += ["--model", directory, "--dtype", options.dtype]
    if options.compile_layers is not None:
        command += ["--compile-layers", str(options.compile_layers).lower()]
    if options.engine_args:
        command += ["--engine-args", options.engine_args]
    server = ServerProcess(command, options.work_directory / "logs" / f"startup-{port}.log")
    answers: list[str] = []

    async def answer() -> bool:
        try:
            with Client(f"127.0.0.1:{port}", timeout=5.0) as client:
                answers.append(client.health())
        except CallError:
            return False
        return True

    async def serves() -> bool:
        return await answer() and answers[-1] == "SERVING"

    try:
        listening = await server.wait_until(answer, interval=0.05)
        serving = await server.wait_until(serves, interval=0.05)
        with Client(f"127.0.0.1:{port}") as client:
            phases = dict(client.get_status().startup_seconds)
    finally:
        server.close()
    return {"listening": listening, "serving": serving, "phases": phases}


def _plot(session: Session, stem: Path) -> None:
    bars = {}
    for row in session.report.summary:
        phases = {
            name.removesuffix("_s"): value
            for name, value in row.items()
            if name.endswith("_s") and name not in ("listening_s", "serving_s")
        }
        rest = row["serving_s"] - sum(phases.values())
        bars[row["start"]] = {"process and imports": max(0.0, rest), **phases}
    save_bars(stem, bars, x_label="seconds", title=session.title)
