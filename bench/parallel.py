"""What it costs and gains to spread a model over several processes.

The elastic engine and plain vLLM with one process, with tensor parallel ranks and with pipeline
stages, as far as they can. Every round starts each engine anew, so starts are compared, too; only
one runs at a time. Then timers in the ranks of the elastic engine show how much of a step goes
into communication.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import typer

from bench.load import closed_loop
from bench.options import depths_of, names, numbers, option
from bench.plots import save_bars
from bench.profile import ProfiledElastic
from bench.session import Session
from bench.setup import LoadOptions, Setup, set_up
from bench.statistics import paired_ratio
from bench.subjects.base import EngineSettings
from bench.subjects.elastic import ElasticInProcess
from bench.subjects.plain_vllm import PlainVllm
from server.calibration.hardware import describe_hardware
from server.engine.ranks import ONE_PROCESS, Ranks, bind_to_cores
from server.errors import InvalidArgument

ENGINES = ("elastic", "vllm")
ONE = "one process"
_RPC_SECONDS = 60.0


@dataclass(frozen=True)
class ParallelOptions(LoadOptions):
    ranks: int = option(2, "Ranks of tensor parallel, and stages of a pipeline.")
    engines: str = option("elastic,vllm", "elastic, vllm (compiled as by default).")
    depths: str = option("", "Depths beside the full one; none: half of the layers.")
    streams: str = option("1,16", "Streams at a time.")
    rounds: int = option(3, "How often every engine is started and measured.")

    def __post_init__(self) -> None:
        LoadOptions.__post_init__(self)
        if self.ranks < 2:
            raise typer.BadParameter("--ranks: allowed: 2 or more")


def run(options: ParallelOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: ParallelOptions) -> Session:
    engines = names(options.engines, "--engines", ENGINES)
    streams = numbers(options.streams)
    setup = set_up(options, max(streams))
    full = setup.model.num_layers
    depths = depths_of(options.depths or str(max(1, full // 2)), full)
    ways = {
        ONE: ONE_PROCESS,
        f"tensor parallel {options.ranks}": Ranks(tensor_parallel_size=options.ranks),
        f"pipeline {options.ranks}": Ranks(pipeline_parallel_size=options.ranks),
    }
    session = Session("parallel", options, setup.model.describe(options.dtype))
    subjects = {
        (engine, way): partial(_subject, engine, replace(setup.settings, ranks=ranks))
        for engine in dict.fromkeys(engines)
        for way, ranks in ways.items()
    }
    with session.progress as progress:
        total = options.rounds * len(subjects)
        plan = itertools.product(range(options.rounds), list(subjects))
        for done, (number, (engine, way)) in enumerate(plan, start=1):
            if (engine, way) in subjects and not await _measure_round(
                session,
                setup,
                subjects[engine, way],
                # A checkpoint of another depth would be another engine of plain vLLM.
                depths if engine == "elastic" else [full],
                streams,
                {"engine": engine, "way": way, "round": number, "num_ranks": ways[way].number},
            ):
                del subjects[engine, way]
            progress.advance("Starting and measuring", done, total)
        for engine, way in subjects:
            if engine == "elastic" and way != ONE:
                with progress.working(f"Timing communication, {way}"):
                    settings = replace(setup.settings, ranks=ways[way], compile_layers=False)
                    await _time_communication(session, setup, settings, way, depths, streams)
    summarize(session, list(subjects), depths, streams)
    session.finish(lambda stem: _plot(session, stem))
    return session


def _subject(engine: str, settings: EngineSettings) -> ElasticInProcess | PlainVllm:
    if engine == "elastic":
        return ElasticInProcess(settings)
    return PlainVllm(settings, settings.model.num_layers, eager=False)


async def _measure_round(
    session: Session,
    setup: Setup,
    make: Callable[[], ElasticInProcess | PlainVllm],
    depths: Sequence[int],
    streams: Sequence[int],
    labels: dict[str, Any],
) -> bool:
    """Start an engine and put every load on it; return whether it can be started here."""
    async with AsyncExitStack() as stack:
        # The binding of ranks to cores is read from the environment, and is not for the others.
        stack.enter_context(mock.patch.dict("os.environ"))
        begin = time.perf_counter()
        try:
            subject = make()
            _bind(subject)
            await subject.start()
        except InvalidArgument as error:
            session.report.notes.append(f"{labels['engine']}, {labels['way']}: refused: {error}")
            return False
        stack.push_async_callback(subject.close)
        session.add_round(
            {**labels, "event": "start", "start_seconds": time.perf_counter() - begin}
        )
        for depth, num_streams in itertools.product(depths, streams):
            work = setup.workload.streams(
                num_streams, 1, depth=depth if labels["engine"] == "elastic" else None
            )
            await closed_loop(subject.generate, work)
            await session.measure(
                partial(closed_loop, subject.generate, work),
                subject.processes,
                **labels,
                depth=depth,
                streams=num_streams,
            )
    return True


def _bind(subject: ElasticInProcess | PlainVllm) -> None:
    """Bind the ranks of plain vLLM as those of the elastic engine, which does it by itself."""
    on_cpu = not describe_hardware()["gpus"]
    if on_cpu and isinstance(subject, PlainVllm) and subject.settings.ranks != ONE_PROCESS:
        bind_to_cores(subject.settings.ranks)


async def _time_communication(
    session: Session,
    setup: Setup,
    settings: EngineSettings,
    way: str,
    depths: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Time every load once, without compiled layers, which on a CPU contain communication."""
    async with AsyncExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ"))
        subject = ProfiledElastic(settings)
        await subject.start()
        stack.push_async_callback(subject.close)
        for depth, num_streams in itertools.product(depths, streams):
            work = setup.workload.streams(num_streams, 1, depth=depth)
            await closed_loop(subject.generate, work)
            await subject.llm.collective_rpc("bench_start_timers", timeout=_RPC_SECONDS)
            load = await closed_loop(subject.generate, work)
            of_ranks = await subject.llm.collective_rpc("bench_read_timers", timeout=_RPC_SECONDS)
            session.add_round(
                {
                    "communication_of": ("elastic", way),
                    "depth": depth,
                    "streams": num_streams,
                    "seconds": load.seconds,
                    "communication_seconds": [parts["communication"][1] for parts in of_ranks],
                    "calls_per_step": of_ranks[0]["communication"][0] / of_ranks[0]["forward"][0],
                }
            )


def summarize(
    session: Session,
    subjects: Sequence[tuple[str, str]],
    depths: Sequence[int],
    streams: Sequence[int],
) -> None:
    """Add a row for every engine, way, depth and number of streams."""
    shares = {
        # A sum ends on all ranks when the last one comes, so the rank that waits least shows
        # what the sum itself takes.
        (*each["communication_of"], each["depth"], each["streams"]): (
            min(each["communication_seconds"]) / each["seconds"],
            each["calls_per_step"],
        )
        for each in session.report.rounds
        if "communication_of" in each
    }
    for (engine, way), depth, num_streams in itertools.product(subjects, depths, streams):
        labels = {"depth": depth, "streams": num_streams}
        rates = session.values("tokens_per_second", engine=engine, way=way, **labels)
        if not rates:
            continue
        one = session.values("tokens_per_second", engine=engine, way=ONE, **labels)
        starts = session.values("start_seconds", event="start", engine=engine, way=way)
        share, calls = shares.get((engine, way, depth, num_streams), (None, None))
        session.report.summary.append(
            {
                "engine": engine,
                "way": way,
                **labels,
                "tokens_per_second": statistics.median(rates),
                "of_one_process": paired_ratio(rates, one).median,
                "start_s": statistics.median(starts),
                "communication": None if share is None else f"{share:.0%}",
                "calls_per_step": calls,
            }
        )
    if shares:
        session.report.notes.append(
            "communication: share of the time, in a run with timers and without compiled layers; "
            "calls per step: sums and gathers over the ranks"
        )


def _plot(session: Session, stem: Path) -> None:
    bars = {
        f"{row['engine']}, {row['way']}, depth {row['depth']}, {row['streams']} streams": {
            "tokens/s": row["tokens_per_second"]
        }
        for row in session.report.summary
    }
    save_bars(stem, bars, x_label="tokens/s", title=session.title)
