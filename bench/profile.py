"""Profiles of one step: in the elastic engine, in vLLM, and outside them.

Timers inside the engine's process count each part without the parts inside it. Work outside the
engine, such as detokenizing and gRPC, is given as CPU time of its process.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import typer

from bench.load import Load, closed_loop
from bench.machine import cpu_seconds
from bench.options import depths_of, names, option
from bench.plots import save_bars
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.stopwatch import Stopwatch
from bench.subjects.base import EngineSettings
from bench.subjects.fathom_server import FathomServer
from bench.subjects.plain_vllm import PlainVllm
from bench.workload import Request
from server.engine.elastic.engine_arguments import (
    compiles_layers,
    prepare_elastic_environment,
    vllm_arguments,
)
from server.engine.elastic.payload import Payload

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

ENGINES = ("elastic", "vllm", "eager", "grpc")
_RPC_SECONDS = 60.0
_COMPILE_SECONDS = 600.0


@dataclass(frozen=True)
class ProfileOptions(LoadOptions):
    engines: str = option(
        "elastic,vllm,eager,grpc",
        "elastic, vllm (compiled), eager; grpc: CPU time of the server's processes.",
    )
    depths: str = option("", "Depths beside the full one; none: half of the layers.")
    streams: int = option(32, "Streams at a time.")
    rounds: int = option(1, "How often each load is run; the profile covers all runs.")


class ProfiledVllm(PlainVllm):
    """Plain vLLM with timers, and with the model runner that the elastic engine uses.

    On a GPU vLLM would choose another runner, whose parts have other names.
    """

    def environment(self) -> AbstractContextManager[None]:
        prepare_elastic_environment()
        return nullcontext()

    def arguments(self, checkpoint: str) -> AsyncEngineArgs:
        arguments = super().arguments(checkpoint)
        arguments.worker_extension_cls = "bench.step_timers.StepTimers"
        return arguments


class ProfiledElastic(ProfiledVllm):
    """The elastic engine's vLLM with timers."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings, settings.model.num_layers, eager=True)
        self.name = "Fathom"

    async def start(self) -> None:
        await super().start()
        config = self.settings.elastic_config()
        if compiles_layers(config):
            answers = await self.llm.collective_rpc("fathom_compile_layers", _COMPILE_SECONDS)
            for _, problem in answers:
                if problem:
                    raise typer.BadParameter(f"--compile-layers: not possible here ({problem})")

    def arguments(self, checkpoint: str) -> AsyncEngineArgs:
        arguments = vllm_arguments(self.settings.elastic_config())
        arguments.worker_extension_cls = "bench.elastic_step_timers.ElasticStepTimers"
        arguments.disable_log_stats = True
        return arguments

    def extra_args(self, request: Request) -> dict[str, Any]:
        return Payload(self.settings.model.selection(request.depth)).to_extra_args()


def run(options: ProfileOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: ProfileOptions) -> Session:
    engines = names(options.engines, "--engines", ENGINES)
    setup = set_up(options, options.streams)
    model, workload, settings = setup.model, setup.workload, setup.settings
    full = model.num_layers
    depths = depths_of(options.depths or str(max(1, full // 2)), full)
    session = Session("profile", options, model.describe(options.dtype))

    def requests(depth: int | None, other: int | None = None) -> list[list[Request]]:
        """Return the streams; if ``other`` is given, every second one runs at that depth."""
        streams = workload.streams(options.streams, options.rounds, depth=depth)
        if other is not None:
            asked = workload.streams(options.streams, options.rounds, depth=other)
            streams[1::2] = asked[1::2]
        return streams

    elastic_loads = {f"depth {depth}": requests(depth) for depth in depths}
    elastic_loads[f"depths {full} and {depths[-1]} mixed"] = requests(full, depths[-1])
    with session.progress as progress:
        for engine in dict.fromkeys(engines):
            subjects: list[tuple[Any, dict[str, list[list[Request]]]]]
            match engine:
                case "elastic":
                    subjects = [(ProfiledElastic(settings), elastic_loads)]
                case "grpc":
                    subjects = [(FathomServer(settings), elastic_loads)]
                case _:
                    eager = engine == "eager"
                    subjects = [
                        (ProfiledVllm(settings, d, eager=eager), {f"depth {d}": requests(None)})
                        for d in depths
                    ]
            for subject, loads in subjects:
                async with AsyncExitStack() as stack:
                    with progress.working(f"Starting {subject.name}"):
                        await subject.start()
                    stack.push_async_callback(subject.close)
                    await closed_loop(subject.generate, requests(None))
                    for name, streams in loads.items():
                        if isinstance(subject, FathomServer):
                            await _measure_server(session, subject, name, streams)
                        else:
                            await _measure_engine(session, subject, name, streams)
    summarize(session)
    session.finish(lambda stem: _plot(session, stem))
    return session


async def _measure_engine(
    session: Session, subject: PlainVllm, load_name: str, streams: list[list[Request]]
) -> None:
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer
    from vllm.v1.engine.output_processor import OutputProcessor

    front = Stopwatch()
    engine = subject.name.partition(", depth")[0]
    missing = await subject.llm.collective_rpc("bench_start_timers", timeout=_RPC_SECONDS)
    with ExitStack() as stack:
        for owner, method, part in (
            (OutputProcessor, "process_outputs", "front: output processing"),
            (BaseIncrementalDetokenizer, "update", "front: detokenizing"),
        ):
            timed = front.timed(part, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, timed))
        load = await session.measure(
            lambda: closed_loop(subject.generate, streams),
            subject.processes,
            repeatable=False,  # the timers have counted by then
            engine=engine,
            load=load_name,
        )
    (parts,) = await subject.llm.collective_rpc("bench_read_timers", timeout=_RPC_SECONDS)
    client_cpu = session.report.rounds[-1]["client_cpu_seconds"]
    in_front = {name: seconds for name, (_, seconds) in front.totals().items()}
    session.report.rounds[-1] |= {
        "num_steps": parts["forward"][0],
        "missing": missing[0],
        "seconds_by_part": {
            **{name: seconds for name, (_, seconds) in parts.items()},
            "waiting": max(0.0, load.seconds - sum(seconds for _, seconds in parts.values())),
        },
        "cpu_seconds_beside": {
            **in_front,
            "front: other": max(0.0, client_cpu - sum(in_front.values())),
        },
    }


async def _measure_server(
    session: Session, server: FathomServer, load_name: str, streams: list[list[Request]]
) -> None:
    processes = server.processes()
    before = [cpu_seconds([process]) for process in processes]

    async def work() -> Load:
        return await closed_loop(server.generate, streams)

    await session.measure(
        work, server.processes, repeatable=False, engine=server.name, load=load_name
    )
    used = [cpu_seconds([p]) - then for p, then in zip(processes, before, strict=True)]
    names = [_role(process, position) for position, process in enumerate(processes)]
    by_role: dict[str, float] = {}
    for name, seconds in zip(names, used, strict=True):
        by_role[name] = by_role.get(name, 0.0) + seconds
    client = session.report.rounds[-1]["client_cpu_seconds"]
    session.report.rounds[-1] |= {
        # Every stream gets one token in each step.
        "num_steps": max(sum(r.num_tokens for r in stream) for stream in streams),
        "cpu_seconds_beside": {**by_role, "load generator": client},
    }


def _role(process: psutil.Process, position: int) -> str:
    if position == 0:
        return "server: gRPC and front"
    return "server: engine" if "EngineCore" in " ".join(process.cmdline()) else "server: other"


def summarize(session: Session) -> None:
    """Add one row for each part, with one column for each engine and load."""
    columns: dict[str, dict[str, float]] = {}
    for each in session.report.rounds:
        per_step = 1000 / each["num_steps"]
        by_part = each.get("seconds_by_part", {})
        column = {"whole step": each["seconds"] * per_step}
        column |= {part: seconds * per_step for part, seconds in by_part.items()}
        column |= {
            f"beside: {part}": seconds * per_step
            for part, seconds in each["cpu_seconds_beside"].items()
        }
        if "layers" in by_part:
            column["share of the layers"] = by_part["layers"] / each["seconds"]
        columns[f"{each['engine']}, {each['load']}"] = column
    parts = dict.fromkeys(part for column in columns.values() for part in column)
    for part in sorted(parts, key=lambda part: _order(part, columns)):
        row: dict[str, Any] = {"ms_per_step": part}
        row |= {name: column.get(part) for name, column in columns.items()}
        session.report.summary.append(row)
    missing = {name for each in session.report.rounds for name in each.get("missing", [])}
    if missing:
        session.report.notes.append(f"Not timed, for lack of: {', '.join(sorted(missing))}.")


def _order(part: str, columns: dict[str, dict[str, float]]) -> tuple[int, float]:
    """Return the whole first, then its parts, the largest first, and work outside it last."""
    if part in ("whole step", "share of the layers"):
        return (0, len(part))
    largest = max(column.get(part, 0.0) for column in columns.values())
    return (2 if part.startswith("beside: ") else 1, -largest)


def _plot(session: Session, stem: Path) -> None:
    bars = {
        f"{each['engine']}, {each['load']}": {
            part: 1000 * seconds / each["num_steps"]
            for part, seconds in each["seconds_by_part"].items()
        }
        for each in session.report.rounds
        if "seconds_by_part" in each
    }
    if bars:
        save_bars(stem, bars, x_label="ms per step", title=session.title)
