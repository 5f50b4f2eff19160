"""The cost of what metrics rank by, compared with a plain prefill of the same tokens.

All run in the same engine, in turns. The published formula through ``output_hidden_states`` of
transformers runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from bench.machine import ForeignLoad
from bench.memory import PeakMemory
from bench.models import BenchModel, prepare_model
from bench.options import Options, option
from bench.plots import save_bars
from bench.report import Target
from bench.session import Session
from bench.setup import engine_settings
from bench.statistics import Spread, paired_ratio
from bench.subjects.base import prepare
from bench.subjects.elastic import ElasticInProcess
from bench.workload import Request
from server.calibration.text_windows import WINDOW
from server.engine.base import LayerSelection

TIME_TARGET = 1.1
MEMORY_TARGET_MIB = 16.0
_MIB = 1 << 20
# The engine measures on as many requests at a time.
_STREAMS = 16
# A search compares with the dense model, which runs as well.
_NUM_PASSES = {"search": 2}
_METHODS = {
    "prefill": "plain prefill",
    "pass": "all metrics of one pass, in the engine",
    "search": "a pass of a search, in the engine",
    "formula": "Block Influence, output_hidden_states",
}


@dataclass(frozen=True)
class CalibrationOptions(Options):
    tokens: int = option(16384, "Tokens to measure on.")
    formula: bool = option(True, "Whether transformers is measured, too.")


def run(options: CalibrationOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: CalibrationOptions) -> Session:
    if options.tokens < 2:
        raise typer.BadParameter(f"--tokens: got {options.tokens}, allowed: 2 or more")
    model = prepare_model(options)
    prepare(model, options.threads)
    window = min(WINDOW, options.max_context - 1)
    settings = engine_settings(options, model, _STREAMS, window + 1)
    session = Session("calibration", options, model.describe(options.dtype))
    windows = random_windows(options.tokens, window, model.vocab_size, options.seed)
    subject = ElasticInProcess(settings)

    async def prefill(chosen: Sequence[Sequence[int]]) -> None:
        slots = asyncio.Semaphore(_STREAMS)

        async def one(ids: Sequence[int]) -> None:
            async with slots:
                async for _ in subject.generate(Request(tuple(ids), 1)):
                    pass

        await asyncio.gather(*[one(ids) for ids in chosen])

    async def one_pass(chosen: Sequence[Sequence[int]]) -> None:
        await subject.engine.measure_importance(chosen, lambda done, total: None)

    async def search(chosen: Sequence[Sequence[int]]) -> None:
        without_one = LayerSelection((0,), (0,))
        await subject.engine.measure_quality(chosen, [without_one], lambda done, total: None)

    methods = {"prefill": prefill, "pass": one_pass, "search": search}
    with session.progress as progress:
        with progress.working("Starting the engine"):
            await subject.start()
        try:
            for method in methods.values():
                await method(windows[: 2 * _STREAMS])
            for number in range(options.rounds):
                for name in methods if number % 2 == 0 else reversed(methods):
                    await _measure(session, subject, name, methods[name], windows, number)
                progress.advance("Measuring in turns", number + 1, options.rounds)
            # Several times as many tokens show whether memory grows with them.
            await _measure(session, subject, "pass", one_pass, windows * 4, -1)
        finally:
            await subject.close()
        if options.formula:
            for number in range(options.rounds):
                _, values = await session.least_disturbed(
                    lambda: asyncio.to_thread(_formula, model, options.dtype, windows)
                )
                session.add_round({"method": "formula", "round": number, **values})
                progress.advance("Measuring transformers", number + 1, options.rounds)
    summarize(session)
    session.finish(lambda stem: _plot(session, stem))
    return session


def random_windows(num_tokens: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return windows of random tokens, ``num_tokens`` in all; the last may be shorter."""
    ids = np.random.default_rng(seed).integers(min(8, vocab_size - 1), vocab_size, num_tokens)
    return [ids[start : start + length].tolist() for start in range(0, num_tokens, length)]


async def _measure(
    session: Session,
    subject: ElasticInProcess,
    name: str,
    method: Callable[[Sequence[Sequence[int]]], Awaitable[None]],
    windows: Sequence[Sequence[int]],
    number: int,
) -> None:
    async def once() -> tuple[None, dict[str, Any]]:
        foreign = ForeignLoad()
        with PeakMemory(subject.processes()) as memory:
            begin = time.perf_counter()
            await method(windows)
            seconds = time.perf_counter() - begin
        return None, {
            "num_tokens": sum(map(len, windows)),
            "seconds": seconds / _NUM_PASSES.get(name, 1),
            "added_peak_mib": memory.added / _MIB,
            "foreign_load": foreign.share(),
        }

    _, values = await session.least_disturbed(once)
    session.add_round({"method": name, "round": number, **values})


def _formula(
    model: BenchModel, dtype: str, windows: Sequence[Sequence[int]]
) -> tuple[None, dict[str, Any]]:
    foreign = ForeignLoad()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "windows.json"
        file.write_text(json.dumps([list(window) for window in windows]))
        result = subprocess.run(
            [sys.executable, "-m", "bench.formula", str(model.directory), dtype, str(file)],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return None, {
        "num_tokens": sum(map(len, windows)),
        "seconds": answer["seconds"],
        "added_peak_mib": answer["added_peak_bytes"] / _MIB,
        "foreign_load": foreign.share(),
    }


def summarize(session: Session) -> None:
    usual = [each for each in session.report.rounds if each["round"] >= 0]
    seconds = {
        method: [each["seconds"] for each in usual if each["method"] == method]
        for method in _METHODS
    }
    for method, name in _METHODS.items():
        of_method = [each for each in usual if each["method"] == method]
        if not of_method:
            continue
        per_million = [each["seconds"] / each["num_tokens"] * 1e6 for each in of_method]
        session.report.summary.append(
            {
                "method": name,
                "seconds_per_million_tokens": statistics.median(per_million),
                "of_prefill": statistics.median(seconds[method])
                / statistics.median(seconds["prefill"]),
                "added_peak_mib": max(each["added_peak_mib"] for each in of_method),
            }
        )
    ratio = paired_ratio(seconds["pass"], seconds["prefill"])
    name = "all metrics of one pass / plain prefill, seconds"
    session.report.targets.append(Target.of(name, ratio, "<=", TIME_TARGET))
    once = max(e["added_peak_mib"] for e in usual if e["method"] == "pass")
    (four_times,) = [e["added_peak_mib"] for e in session.report.rounds if e["round"] < 0]
    growth = Spread.of([max(0.0, four_times - once)])
    name = "memory added by four times the tokens"
    session.report.targets.append(Target.of(name, growth, "<=", MEMORY_TARGET_MIB, "MiB"))


def _plot(session: Session, stem: Path) -> None:
    bars = {
        row["method"]: {"seconds": row["seconds_per_million_tokens"]}
        for row in session.report.summary
    }
    save_bars(stem, bars, x_label="seconds per million tokens", title=session.title)
