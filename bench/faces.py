"""Fathom over HTTP and over gRPC, and vLLM's own OpenAI server, on the same work.

They take turns within each round. HTTP and gRPC are two faces of one server, so their difference is
that of the faces alone.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from bench.lengths import Lengths
from bench.options import names, numbers, option
from bench.plots import save_bars
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.statistics import paired_ratio
from bench.subjects.base import EngineSettings, Subject, free_port
from bench.subjects.fathom_http import FathomHttp
from bench.subjects.fathom_server import FathomServer
from bench.subjects.openai_server import OpenAiServer

KINDS = ("http", "grpc", "vllm")


@dataclass(frozen=True)
class FaceOptions(LoadOptions):
    model: str = option("demo", "random, demo, or a checkpoint directory.")
    servers: str = option(
        "http,grpc,vllm", "What to measure: Fathom over http and grpc, and vLLM's own server."
    )
    streams: str = option("1,32", "Numbers of streams.")


def run(options: FaceOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: FaceOptions) -> Session:
    kinds = tuple(dict.fromkeys(names(options.servers, "--servers", KINDS)))
    if len(kinds) < 2:
        raise typer.BadParameter(f"--servers: got {options.servers!r}, allowed: two or three")
    streams = numbers(options.streams)
    setup = set_up(options, max(streams))
    workload = setup.workload
    session = Session("http", options, setup.model.describe(options.dtype))
    warm_up = replace(workload, output=Lengths.parse("8"))
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(session.progress)
        with progress.working("Starting the servers"):
            subjects = await _start(kinds, setup.settings, stack)
        done, total = 0, len(streams) * options.rounds * len(kinds)
        for num_streams in streams:
            for kind in kinds:
                await session.closed_loop(
                    subjects[kind], warm_up.streams(num_streams, 1), repeatable=False, warm_up=True
                )
            for number in range(options.rounds):
                # The order changes, so that no server always follows the same one.
                for kind in kinds if number % 2 == 0 else reversed(kinds):
                    await session.closed_loop(
                        subjects[kind],
                        workload.streams(num_streams, 1),
                        server=kind,
                        streams=num_streams,
                        round=number,
                    )
                    done += 1
                    progress.advance("Measuring in turns", done, total)
    session.report.rounds[:] = [r for r in session.report.rounds if not r.get("warm_up")]
    for num_streams in streams:
        summarize(session, num_streams, {kind: subjects[kind].name for kind in kinds})
    session.finish(lambda stem: _plot(session, stem))
    return session


async def _start(
    kinds: Sequence[str], settings: EngineSettings, stack: AsyncExitStack
) -> dict[str, Subject]:
    """Start what ``kinds`` take, and have ``stack`` close it."""
    subjects: dict[str, Subject] = {}
    if "http" in kinds or "grpc" in kinds:
        http_port = free_port()
        server = FathomServer(settings, http_port=http_port)
        stack.push_async_callback(server.close)
        await server.start()
        face = FathomHttp(server, http_port)
        stack.push_async_callback(face.close)
        await face.start()
        subjects |= {"http": face, "grpc": server}
    if "vllm" in kinds:
        other = OpenAiServer(settings)
        stack.push_async_callback(other.close)
        await other.start()
        subjects["vllm"] = other
    return subjects


def summarize(session: Session, num_streams: int, titles: dict[str, str]) -> None:
    """Add a row for each server."""

    def of(kind: str, quantity: str) -> list[float]:
        return session.values(quantity, streams=num_streams, server=kind)

    for kind, title in titles.items():
        row: dict[str, Any] = {
            "streams": num_streams,
            "server": title,
            "tokens_per_second": statistics.median(of(kind, "tokens_per_second")),
        }
        for name in titles:
            if name != "http":
                own, other = (of(each, "tokens_per_second") for each in (kind, name))
                row[f"of_{name}"] = paired_ratio(own, other).median
        for quantity, label in (("time_to_first_token", "ttft"), ("inter_token_latency", "itl")):
            for rank in ("p50", "p95"):
                values = of(kind, f"{quantity}.{rank}")
                row[f"{label}_{rank}_ms"] = 1000 * statistics.median(values) if values else None
        session.report.summary.append(row)


def _plot(session: Session, stem: Path) -> None:
    bars = {
        f"{row['server']}, {row['streams']}x": {"tokens/s": row["tokens_per_second"]}
        for row in session.report.summary
    }
    save_bars(stem, bars, x_label="tokens/s", title=session.title)
