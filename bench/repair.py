"""What repair costs in speed: tokens per second with maps and without, in turns, by depth.

The maps are random, of the model's type, for every layer. Speed does not depend on their values,
so small ones keep the results finite.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.load import closed_loop
from bench.models import BenchModel
from bench.options import depths_of, numbers, option
from bench.plots import save_lines
from bench.report import Target
from bench.session import Session
from bench.setup import LoadOptions, set_up
from bench.statistics import paired_ratio
from bench.subjects.elastic import ElasticInProcess
from bench.workload import Request
from server.engine.base import GenerationRequest, SamplingOptions

RATIO_TARGET = 0.95
_DEVIATION = 1e-3


@dataclass(frozen=True)
class RepairOptions(LoadOptions):
    depths: str = option("", "Depths; none: three quarters, a half and a quarter of the layers.")
    streams: str = option("1,32", "Streams at a time.")


def run(options: RepairOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: RepairOptions) -> Session:
    streams = numbers(options.streams)
    setup = set_up(options, max(streams))
    model = setup.model
    full, *depths = depths_of(options.depths, model.num_layers)
    session = Session("repair", options, model.describe(options.dtype))
    subject = ElasticInProcess(setup.settings)
    ids = itertools.count()

    def generating(repair: str | None) -> Any:
        async def generate(request: Request) -> AsyncIterator[int]:
            layers = replace(model.selection(request.depth), repair=repair)
            generation = GenerationRequest(
                f"repair-{next(ids)}",
                request.prompt_ids,
                layers,
                SamplingOptions(temperature=0.0, max_tokens=request.num_tokens, ignore_eos=True),
            )
            async for delta in subject.engine.generate(generation):
                yield len(delta.token_ids)

        return generate

    with session.progress as progress, tempfile.TemporaryDirectory() as directory:
        with progress.working("Starting the engine"):
            await subject.start()
        try:
            path = Path(directory) / "maps.safetensors"
            _write_maps(model, options, path)
            kinds = {"without": None, "with": await subject.engine.install_repair(path)}
            total = options.rounds * len(streams) * len(depths) * len(kinds)
            done = 0
            for number in range(-1, options.rounds):  # the first one warms up
                for num_streams, depth in itertools.product(streams, depths):
                    work = setup.workload.streams(num_streams, 1, depth=depth)
                    for kind in kinds if number % 2 else reversed(kinds):
                        generate = generating(kinds[kind])
                        if number < 0:
                            await closed_loop(generate, work)
                            continue
                        await session.measure(
                            partial(closed_loop, generate, work),
                            subject.processes,
                            repair=kind,
                            depth=depth,
                            streams=num_streams,
                            round=number,
                        )
                        done += 1
                        progress.advance("Measuring in turns", done, total)
        finally:
            await subject.close()
    summarize(session, depths, streams)
    session.finish(lambda stem: _plot(session, stem, full))
    return session


def _write_maps(model: BenchModel, options: RepairOptions, path: Path) -> None:
    import torch

    from pruning.repair import LayerMap, RepairMaps, save_maps

    hidden = model.config["hidden_size"]
    generator = torch.Generator().manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    maps = {
        layer: LayerMap(
            (_DEVIATION * torch.randn(hidden, hidden, generator=generator)).to(dtype), 1.0, 1.0
        )
        for layer in range(model.num_layers)
    }
    save_maps(RepairMaps(maps, model.num_layers, "random", "random", 1), path)


def summarize(session: Session, depths: list[int], streams: tuple[int, ...]) -> None:
    """Add a row and a target for every depth and number of streams."""
    for num_streams, depth in itertools.product(streams, depths):
        labels = {"depth": depth, "streams": num_streams}
        rates = {
            kind: session.values("tokens_per_second", repair=kind, **labels)
            for kind in ("without", "with")
        }
        ratio = paired_ratio(rates["with"], rates["without"])
        session.report.summary.append(
            {
                **labels,
                "without_tokens_per_second": sorted(rates["without"])[len(rates["without"]) // 2],
                "with_tokens_per_second": sorted(rates["with"])[len(rates["with"]) // 2],
                "with_of_without": ratio.median,
            }
        )
        name = f"tokens/s with repair / without, depth {depth}, {num_streams} streams"
        session.report.targets.append(Target.of(name, ratio, ">=", RATIO_TARGET))


def _plot(session: Session, stem: Path, full: int) -> None:
    lines: dict[str, dict[float, float]] = {}
    for row in session.report.summary:
        line = lines.setdefault(f"{row['streams']} streams", {float(full): 1.0})
        line[float(row["depth"])] = row["with_of_without"]
    save_lines(
        stem,
        lines,
        x_label="depth",
        y_label="tokens/s with repair / without",
        title=session.title,
    )
