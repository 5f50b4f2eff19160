"""Fathom, plain vLLM and transformers compared on the same work.

They take turns within each round. Engines that wait use no processor.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.lengths import Lengths
from bench.limit import StepTime, best_speedup
from bench.models import BenchModel
from bench.options import depths_of, names, numbers, option
from bench.plots import save_bars
from bench.report import Target
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.statistics import Spread, paired_difference, paired_ratio
from bench.subjects.base import EngineSettings, Subject
from bench.subjects.elastic import ElasticInProcess
from bench.subjects.fathom_server import FathomServer
from bench.subjects.openai_server import OpenAiServer
from bench.subjects.plain_vllm import PlainVllm
from bench.subjects.transformers_generate import TransformersGenerate
from bench.throughput import streams_name

KINDS = ("grpc", "elastic", "uncompiled", "vllm", "eager", "openai", "transformers")
DENSE_TARGET = 0.98
EXPORTED_TARGET = 0.97
LIMIT_TARGET = 0.95
GRPC_TARGET = 0.95
GRPC_LATENCY_TARGET_MS = 1.0


@dataclass(frozen=True)
class PeersOptions(LoadOptions):
    peers: str = option(
        "grpc,elastic,vllm,eager,openai,transformers",
        "What to measure; uncompiled is elastic without compiled layers. vllm and eager mean one "
        "engine for each depth, on its own checkpoint.",
    )
    depths: str = option("", "Depths beside the full one; none: half of the layers.")
    streams: str = option("1,32", "Numbers of streams.")


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine or server at one depth; ``kind`` is one of ``KINDS``."""

    kind: str
    depth: int
    subject: Subject | TransformersGenerate
    # The depth that requests ask for; None if the checkpoint has only one.
    asked_depth: int | None

    @property
    def labels(self) -> dict[str, Any]:
        return {"peer": self.kind, "depth": self.depth}


def run(options: PeersOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: PeersOptions) -> Session:
    kinds = names(options.peers, "--peers", KINDS)
    streams = numbers(options.streams)
    setup = set_up(options, max(streams))
    model, workload = setup.model, setup.workload
    depths = depths_of(options.depths or str(max(1, model.num_layers // 2)), model.num_layers)
    session = Session("peers", options, model.describe(options.dtype))
    warm_up = replace(workload, output=Lengths.parse("8"))
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(session.progress)
        contenders: list[Contender] = []
        for contender in _contenders(kinds, depths, setup.settings, model):
            if all(contender.subject is not other.subject for other in contenders):
                with progress.working(f"Starting {contender.subject.name}"):
                    await contender.subject.start()
                stack.push_async_callback(contender.subject.close)
            contenders.append(contender)
        done, total = 0, len(streams) * options.rounds * len(contenders)
        for num_streams in streams:
            for contender in contenders:
                requests = warm_up.streams(num_streams, 1, depth=contender.asked_depth)
                await session.closed_loop(
                    contender.subject, requests, repeatable=False, warm_up=True
                )
            for number in range(options.rounds):
                # The order changes, so that no engine always follows the same one.
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    await session.closed_loop(
                        contender.subject,
                        workload.streams(num_streams, 1, depth=contender.asked_depth),
                        **contender.labels,
                        streams=num_streams,
                        round=number,
                    )
                    done += 1
                    progress.advance("Measuring in turns", done, total)
    session.report.rounds[:] = [r for r in session.report.rounds if not r.get("warm_up")]
    for num_streams in streams:
        summarize(session, num_streams, contenders, model.num_layers)
    session.finish(lambda stem: _plot(session, stem))
    return session


def _contenders(
    kinds: Sequence[str], depths: Sequence[int], settings: EngineSettings, model: BenchModel
) -> list[Contender]:
    contenders: list[Contender] = []
    full = model.num_layers
    for kind in dict.fromkeys(kinds):
        match kind:
            case "grpc" | "elastic" | "uncompiled":
                shared: Subject
                if kind == "grpc":
                    shared = FathomServer(settings)
                elif kind == "elastic":
                    shared = ElasticInProcess(settings)
                else:
                    shared = ElasticInProcess(replace(settings, compile_layers=False))
                contenders += [Contender(kind, depth, shared, depth) for depth in depths]
            case "vllm" | "eager":
                contenders += [
                    Contender(kind, d, PlainVllm(settings, d, eager=kind == "eager"), None)
                    for d in depths
                ]
            case "openai":
                contenders.append(Contender(kind, full, OpenAiServer(settings), None))
            case _:
                contenders.append(Contender(kind, full, TransformersGenerate(settings), None))
    return contenders


def summarize(
    session: Session, num_streams: int, contenders: Sequence[Contender], num_layers: int
) -> None:
    """Add the rows for one number of streams, and the targets."""
    speeds = {
        (c.kind, c.depth): session.values("tokens_per_second", streams=num_streams, **c.labels)
        for c in contenders
    }
    # The reference of equal depth if there is one, else the dense one.
    to = ("vllm", "eager", "elastic")
    for contender in contenders:
        own = speeds[contender.kind, contender.depth]
        row: dict[str, Any] = {
            "streams": num_streams,
            "peer": contender.subject.name,
            "depth": contender.depth,
            "tokens_per_second": statistics.median(own),
        }
        for kind in to:
            other = speeds.get((kind, contender.depth))
            row[f"of_{kind}"] = paired_ratio(own, other).median if other else None
        for name, label in (("time_to_first_token", "ttft"), ("inter_token_latency", "itl")):
            for rank in ("p50", "p95", "p99"):
                values = session.values(f"{name}.{rank}", streams=num_streams, **contender.labels)
                known = values and contender.kind != "transformers"
                row[f"{label}_{rank}_ms"] = 1000 * statistics.median(values) if known else None
        session.report.summary.append(row)
    session.report.targets += targets(session, num_streams, speeds, num_layers)


def targets(
    session: Session,
    num_streams: int,
    speeds: dict[tuple[str, int], list[float]],
    num_layers: int,
) -> list[Target]:
    """Return the targets of the measured peers."""
    result = []
    depths = sorted({depth for _, depth in speeds}, reverse=True)
    for_streams = streams_name(num_streams)
    for kind in ("vllm", "eager"):
        for depth in depths:
            if ("elastic", depth) in speeds and (kind, depth) in speeds:
                dense = depth == num_layers
                ratio = paired_ratio(speeds["elastic", depth], speeds[kind, depth])
                of = "dense" if dense else f"exported depth {depth}"
                how = "vLLM" if kind == "vllm" else "vLLM eager"
                bound = DENSE_TARGET if dense else EXPORTED_TARGET
                name = f"{for_streams}: Fathom depth {depth} / {how} {of}"
                result.append(Target.of(name, ratio, ">=", bound))
    for depth in depths:
        # The share of the layers comes from dedicated engines, not from the engine that is judged.
        kind = "vllm" if ("vllm", num_layers) in speeds else "eager"
        own, full = speeds.get(("elastic", depth)), speeds.get(("elastic", num_layers))
        dedicated = {d: statistics.median(v) for (k, d), v in speeds.items() if k == kind}
        line = StepTime.fit({d: 1 / speed for d, speed in dedicated.items()})
        if depth != num_layers and own and full and line is not None:
            limit = best_speedup(line.layer_share(num_layers), depth, num_layers)
            ratio = paired_ratio(own, full)
            spread = Spread(ratio.median / limit, ratio.low / limit, ratio.high / limit)
            name = f"{for_streams}: Fathom depth {depth} / depth {num_layers}, of the limit"
            result.append(Target.of(name, spread, ">=", LIMIT_TARGET))
    grpc, elastic = speeds.get(("grpc", num_layers)), speeds.get(("elastic", num_layers))
    if grpc and elastic:
        ratio = paired_ratio(grpc, elastic)
        name = f"{for_streams}: gRPC / in process"
        result.append(Target.of(name, ratio, ">=", GRPC_TARGET))
        added = paired_difference(
            *(
                session.values(
                    "inter_token_latency.p50", streams=num_streams, peer=kind, depth=num_layers
                )
                for kind in ("grpc", "elastic")
            )
        )
        added = Spread(1000 * added.median, 1000 * added.low, 1000 * added.high)
        name = f"{for_streams}: added by gRPC to the median inter-token latency"
        result.append(Target.of(name, added, "<=", GRPC_LATENCY_TARGET_MS, "ms"))
    return result


def _plot(session: Session, stem: Path) -> None:
    bars = {
        f"{row['peer']}, depth {row['depth']}, {row['streams']}x"
        if "depth" not in row["peer"]
        else f"{row['peer']}, {row['streams']}x": {"tokens/s": row["tokens_per_second"]}
        for row in session.report.summary
    }
    save_bars(stem, bars, x_label="tokens/s", title=session.title)
