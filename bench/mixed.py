"""A half-and-half mix of two depths, in one elastic engine and in two dedicated engines.

All streams are busy during the whole measurement. Each dedicated engine takes the streams of its
depth, and on a CPU half of the threads.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import typer

from bench.load import Generate, Load, steady_loop
from bench.options import option
from bench.plots import save_bars
from bench.report import Target
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.statistics import paired_ratio
from bench.subjects.base import Subject
from bench.subjects.elastic import ElasticInProcess
from bench.subjects.plain_vllm import PlainVllm
from bench.workload import Request

_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class MixedOptions(LoadOptions):
    depth: int | None = option(None, "Depth of the second half; none: half of the layers.")
    streams: int = option(32, "Streams in all, an even number.")
    seconds: float = option(15.0, "How long each measurement counts tokens.")
    eager: bool = option(False, "Whether the dedicated engines run uncompiled.")


def run(options: MixedOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: MixedOptions) -> Session:
    if options.streams < 2 or options.streams % 2:
        raise typer.BadParameter(f"--streams: got {options.streams}, allowed: an even number")
    setup = set_up(options, options.streams)
    model, settings = setup.model, setup.settings
    full = model.num_layers
    depth = options.depth if options.depth is not None else max(1, full // 2)
    if not 1 <= depth < full:
        raise typer.BadParameter(f"--depth: got {depth}, allowed: 1 to {full - 1}")
    session = Session("mixed", options, model.describe(options.dtype))
    elastic = ElasticInProcess(settings)
    dedicated = [PlainVllm(settings, each, eager=options.eager) for each in (full, depth)]
    half = options.streams // 2
    # The first half of the streams is dense, the second is not.
    contenders: dict[str, tuple[list[Subject], list[Generate], list[list[Request]]]] = {
        "one elastic engine": (
            [elastic],
            [elastic.generate] * options.streams,
            [
                [Request(r.prompt_ids, r.num_tokens, full if i < half else depth) for r in stream]
                for i, stream in enumerate(setup.workload.streams(options.streams, 4))
            ],
        ),
        "two dedicated engines": (
            list(dedicated),
            [dedicated[int(i >= half)].generate for i in range(options.streams)],
            setup.workload.streams(options.streams, 4),
        ),
    }
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(session.progress)
        threads = int(os.environ.get(_THREADS, "1"))
        starts: list[tuple[Subject, int]] = [(elastic, threads)]
        starts += [(each, max(1, threads // 2)) for each in dedicated]
        for subject, num_threads in starts:
            with (
                progress.working(f"Starting {subject.name}"),
                mock.patch.dict(os.environ, {_THREADS: str(num_threads)}),
            ):
                await subject.start()
            stack.push_async_callback(subject.close)
        for _, generates, streams in contenders.values():
            await steady_loop(generates, streams, 1.0)
        for number in range(options.rounds):
            for position, (name, (subjects, generates, streams)) in enumerate(contenders.items()):
                await _measure_once(
                    session, name, subjects, generates, streams, options.seconds, number
                )
                done = number * len(contenders) + position + 1
                progress.advance("Measuring in turns", done, options.rounds * len(contenders))
    summarize(session, depth, full)
    session.finish(lambda stem: _plot(session, stem))
    return session


async def _measure_once(
    session: Session,
    name: str,
    subjects: Sequence[Subject],
    generates: Sequence[Generate],
    streams: Sequence[Sequence[Request]],
    seconds: float,
    number: int,
) -> None:
    halves: list[Load] = []

    async def work() -> Load:
        loads = await steady_loop(generates, streams, seconds)
        middle = len(loads) // 2
        halves[:] = [_together(half) for half in (loads[:middle], loads[middle:])]
        return _together(loads)

    def processes() -> list[psutil.Process]:
        return [process for subject in subjects for process in subject.processes()]

    await session.measure(work, processes, engines=name, round=number)
    session.report.rounds[-1] |= {
        "dense_tokens_per_second": halves[0].tokens_per_second,
        "pruned_tokens_per_second": halves[1].tokens_per_second,
    }


def _together(loads: Sequence[Load]) -> Load:
    timelines = tuple(timeline for load in loads for timeline in load.timelines)
    return Load(timelines, loads[0].begin, loads[0].end)


def summarize(session: Session, depth: int, full: int) -> None:
    speeds = {
        name: session.values("tokens_per_second", engines=name)
        for name in ("one elastic engine", "two dedicated engines")
    }
    one, two = speeds.values()
    for name, values in speeds.items():
        row = {
            "engines": name,
            "tokens_per_second": statistics.median(values),
            "of_two_dedicated": paired_ratio(values, two).median,
        }
        for half, label in (("dense", full), ("pruned", depth)):
            row[f"depth_{label}_tokens_per_second"] = statistics.median(
                session.values(f"{half}_tokens_per_second", engines=name)
            )
        for rank in ("p50", "p95", "p99"):
            row[f"itl_{rank}_ms"] = 1000 * statistics.median(
                session.values(f"inter_token_latency.{rank}", engines=name)
            )
        session.report.summary.append(row)
    name = "one elastic engine / two dedicated engines"
    session.report.targets.append(Target.of(name, paired_ratio(one, two), ">=", 1.0))


def _plot(session: Session, stem: Path) -> None:
    bars = {
        row["engines"]: {
            name.removesuffix("_tokens_per_second").replace("_", " "): value
            for name, value in row.items()
            if name.startswith("depth_")
        }
        for row in session.report.summary
    }
    save_bars(stem, bars, x_label="tokens/s", title=session.title)
