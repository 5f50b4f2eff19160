"""Throughput and latency of a server over gRPC at several depths and numbers of streams.

Each depth is compared with full depth, and with the limit that follows from the time outside the
layers.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bench.lengths import Lengths
from bench.limit import StepTime, limits
from bench.load import Load, closed_loop, open_loop
from bench.memory import unique_mib
from bench.options import depths_of, numbers, option
from bench.plots import save_lines
from bench.report import Target
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.statistics import Spread, paired_ratio
from bench.subjects.fathom_server import FathomServer
from bench.workload import Workload, poisson_arrivals
from server.cli.connection import Connection

LIMIT_TARGET = 0.95
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class ThroughputOptions(LoadOptions):
    address: str = option(
        "", "HOST:PORT of a running server; none: one is started for the measurement."
    )
    depths: str = option(
        "", "Depths beside the full one; none: 3/4, 1/2 and 1/4 of the layers, and one layer."
    )
    streams: str = option("1,8,32", "Numbers of streams that each send one request after another.")
    rates: str = option("", "Requests per second, as in 0.5,2, that arrive at random instead.")
    requests: int = option(1, "Requests of each stream; of a rate, as many as --arrivals.")
    arrivals: int = option(64, "Requests in all at each of --rates.")


def run(options: ThroughputOptions, connection: Connection) -> None:
    asyncio.run(measure(options, connection))


async def measure(options: ThroughputOptions, connection: Connection) -> Session:
    """Measure the server that ``connection`` leads to, if its address is not empty."""
    prompt, output = options.prompt_lengths, options.output_lengths
    rates = _rates(options.rates)
    streams = () if rates else numbers(options.streams)
    server, description, num_layers, vocab_size = _server(options, connection, streams)
    session = Session("throughput", options, description)
    depths = depths_of(options.depths, num_layers)
    workload = Workload(prompt, output, vocab_size, options.seed)
    warm_up = Workload(prompt, Lengths.parse(str(_WARM_UP_TOKENS)), vocab_size, options.seed)
    loads: list[tuple[str, float]] = [("streams", n) for n in streams]
    loads += [("rate", rate) for rate in rates]
    try:
        with session.progress as progress:
            with progress.working("Starting the server"):
                await server.start()
            if server.processes():
                await _measure_memory(session, server, workload, num_layers)
            done, total = 0, len(loads) * options.rounds * len(depths)
            for kind, size in loads:
                num_streams = int(size) if kind == "streams" else 8
                for depth in depths:
                    requests = warm_up.streams(num_streams, 1, depth=depth)
                    await session.closed_loop(server, requests, repeatable=False, warm_up=True)
                for number in range(options.rounds):
                    for depth in depths:
                        work = (
                            _closed(server, workload, num_streams, options.requests, depth)
                            if kind == "streams"
                            else _open(server, workload, size, options.arrivals, depth)
                        )
                        labels: dict[str, Any] = {kind: size, "depth": depth, "round": number}
                        await session.measure(work, server.processes, **labels)
                        done += 1
                        progress.advance("Measuring throughput", done, total)
    finally:
        await server.close()
    session.report.rounds[:] = [r for r in session.report.rounds if not r.get("warm_up")]
    for kind, size in loads:
        summarize(session, kind, size, depths, num_layers)
    session.finish(lambda stem: _plot(session, stem, loads, depths))
    return session


def _closed(
    server: FathomServer, workload: Workload, num_streams: int, num_requests: int, depth: int
) -> Callable[[], Awaitable[Load]]:
    streams = workload.streams(num_streams, num_requests, depth=depth)
    return lambda: closed_loop(server.generate, streams)


def _open(
    server: FathomServer, workload: Workload, rate: float, num_requests: int, depth: int
) -> Callable[[], Awaitable[Load]]:
    requests = workload.requests(num_requests, depth=depth)
    arrivals = poisson_arrivals(rate, num_requests, workload.seed)
    return lambda: open_loop(server.generate, requests, arrivals)


async def _measure_memory(
    session: Session, server: FathomServer, workload: Workload, num_layers: int
) -> None:
    """Note the server's memory after one depth has run, and after all depths in one batch."""
    num_streams = 32
    dense = workload.streams(num_streams, 1, depth=num_layers)
    await closed_loop(server.generate, dense)
    one = unique_mib(server.processes())
    every = [
        workload.streams(num_streams, 1, depth=1 + stream % num_layers)[stream]
        for stream in range(num_streams)
    ]
    await closed_loop(server.generate, every)
    session.report.notes.append(
        f"Memory of the server: {one:.0f} MiB after full depth alone, "
        f"{unique_mib(server.processes()):.0f} MiB after every depth in one batch."
    )


def summarize(
    session: Session, kind: str, size: float, depths: tuple[int, ...], num_layers: int
) -> None:
    """Add the rows of one load to the summary, and its targets."""
    speeds = {d: session.values("tokens_per_second", **{kind: size, "depth": d}) for d in depths}
    # In a closed loop all depths do the same work, so that seconds per token are seconds per
    # step, up to a factor. At a given rate of arrivals they are not.
    best: dict[int, float | None] = dict.fromkeys(depths)
    share = None
    if kind == "streams":
        seconds = {d: statistics.median(1 / speed for speed in speeds[d]) for d in depths}
        best = limits(seconds, num_layers)
        line = StepTime.fit(seconds)
        share = None if line is None else line.layer_share(num_layers)
    for depth in depths:
        labels = {kind: size, "depth": depth}
        ratio = paired_ratio(speeds[depth], speeds[num_layers])
        limit = best[depth]
        of_limit = None if limit is None or depth == num_layers else ratio.median / limit
        row: dict[str, Any] = {
            kind: size,
            "depth": depth,
            "tokens_per_second": statistics.median(speeds[depth]),
            "of_full_depth": ratio.median,
            "range": f"{ratio.low:.3f} to {ratio.high:.3f}",
        }
        if kind == "streams":
            row |= {"limit": limit, "of_limit": of_limit, "layers_alone": num_layers / depth}
            row["layer_share"] = share
        for name, label in (("time_to_first_token", "ttft"), ("inter_token_latency", "itl")):
            for rank in ("p50", "p95", "p99"):
                values = session.values(f"{name}.{rank}", **labels)
                row[f"{label}_{rank}_ms"] = 1000 * statistics.median(values) if values else None
        session.report.summary.append(row)
        if limit is not None and of_limit is not None:
            spread = Spread(of_limit, ratio.low / limit, ratio.high / limit)
            name = f"{streams_name(size)}, depth {depth}, of the limit"
            session.report.targets.append(Target.of(name, spread, ">=", LIMIT_TARGET))


def streams_name(num_streams: float) -> str:
    return "1 stream" if num_streams == 1 else f"{num_streams:g} streams"


def _rates(text: str) -> tuple[float, ...]:
    try:
        result = tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        result = (0.0,)
    if any(not 0 < rate < 1e6 for rate in result):
        raise typer.BadParameter(f"--rates: got {text!r}, allowed: numbers above 0, as in 0.5,2")
    return result


def _server(
    options: ThroughputOptions, connection: Connection, streams: tuple[int, ...]
) -> tuple[FathomServer, dict[str, Any], int, int]:
    """Return the server with what it serves: a description, layers and vocabulary."""
    if connection.address:
        server = FathomServer(None, connection)
        model = server.model()
        description = {"name": model.name, "num_layers": model.num_layers, "dtype": model.dtype}
        return server, description, model.num_layers, model.vocab_size
    setup = set_up(options, max([*streams, 64]))
    description = setup.model.describe(options.dtype)
    return FathomServer(setup.settings), description, setup.model.num_layers, setup.model.vocab_size


def _plot(
    session: Session, stem: Path, loads: list[tuple[str, float]], depths: tuple[int, ...]
) -> None:
    rows = session.report.summary
    lines: dict[str, dict[float, float]] = {}
    dashed = []
    for kind, size in loads:
        of_load = [row for row in rows if row.get(kind) == size]
        name = streams_name(size) if kind == "streams" else f"{size:g} requests/s"
        lines[name] = {row["depth"]: row["of_full_depth"] for row in of_load}
        if known := {r["depth"]: r["limit"] for r in of_load if r.get("limit") is not None}:
            lines[f"{name}, limit"] = known
            dashed.append(f"{name}, limit")
    save_lines(
        stem,
        lines,
        x_label="depth, layers",
        y_label="tokens/s, relative to full depth",
        title=session.title,
        dashed=dashed,
    )
