"""The cost of quantization, and the perplexity of both orders of quantizing and pruning.

    python -m bench.quantization [--model DIR] [--depths 16 12 8] [--output FILE]

``fathom quantize`` and ``fathom export`` run as processes, with their time and peak memory. Each
checkpoint's perplexity is measured by the elastic engine on the held-out text of ``fathom model``,
always with the plan of the unquantized model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pruning.plan import Plan
from pruning.surgery import count_layers
from server.calibration.text_windows import text_windows
from server.config import Settings
from server.engine.base import LayerSelection
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.model.demo_corpus import Part, documents
from server.model.source import DEMO_MODEL

_FATHOM = Path(sys.executable).parent / "fathom"
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """A command that has been run; memory is the peak of resident memory."""

    seconds: float
    peak_mib: float
    # Peak memory of the process that the command started; 0 if it started none.
    peak_worker_mib: float


def run(*arguments: str | Path) -> Run:
    """Run a subcommand of ``fathom``; raises :class:`SystemExit` with its log if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen([_FATHOM, *arguments], stdout=log, stderr=log)
        watched = psutil.Process(process.pid)
        peaks = {0: 0.0, 1: 0.0}
        while process.poll() is None:
            for level, processes in enumerate(([watched], watched_children(watched))):
                memory = [resident_mib(each) for each in processes]
                peaks[level] = max([peaks[level], *memory])
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            log.seek(0)
            raise SystemExit(log.read())
    return Run(seconds, peaks[0], peaks[1])


def watched_children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def resident_mib(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


async def perplexities(
    model: Path, selections: Sequence[LayerSelection], num_tokens: int
) -> list[float]:
    """Return the perplexity of each selection on the held-out text."""
    config = ElasticConfig(model, model.name, kv_cache_gib=0.25, compile_layers=False)
    engine = ElasticEngine(config)
    await engine.start()
    try:
        texts = list(documents([Part.HELD_OUT]))
        windows = text_windows(
            engine.tokenize,
            texts,
            max_context=engine.model.max_context,
            max_tokens=num_tokens,
            vocab_size=engine.model.vocab_size,
        )
        qualities = await engine.measure_quality(windows, selections, lambda done, total: None)
    finally:
        await engine.shutdown()
    return [quality.perplexity for quality in qualities]


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, object]:
    model: Path = arguments.model
    depths: list[int] = sorted(set(arguments.depths), reverse=True)
    num_layers = count_layers(model)
    tokens = ["--calibration-tokens", str(arguments.calibration_tokens)]
    quantize = ["--quantize", f"gptq-{arguments.bits}bit"]
    state = directory / "state"

    run("export", "--model", model, "--state-dir", state, *tokens, "--depth", "1", directory / "1")
    (plan_file,) = state.glob("plan-*.json")
    plan = Plan.load(plan_file)
    quantized = directory / "quantized"
    bits = ["--bits", str(arguments.bits)]
    runs = {"quantize": run("quantize", model, quantized, *bits, *tokens)}
    half = str(max(1, num_layers // 2))
    common: list[str | Path] = ["export", "--plan", plan_file, "--depth", half]
    runs["export"] = run(*common, "--model", model, directory / "half")
    runs["export, quantized"] = run(*common, "--model", quantized, directory / "quantized-half")

    selections = [LayerSelection(plan.skipped(d), plan.skipped(d)) for d in depths]
    table = {
        name: dict(
            zip(
                depths,
                asyncio.run(perplexities(path, selections, arguments.tokens)),
                strict=True,
            )
        )
        for name, path in (("not quantized", model), ("quantize-then-prune", quantized))
    }
    pruned_first = table["prune-then-quantize"] = {}
    for depth in depths:
        if depth == num_layers:
            pruned_first[depth] = table["quantize-then-prune"][depth]  # nothing to prune
            continue
        out = directory / f"pruned-{depth}"
        order: list[str | Path] = [
            "--order",
            "prune-then-quantize",
            "--depth",
            str(depth),
            "--plan",
            plan_file,
        ]
        runs[f"prune-then-quantize, depth {depth}"] = run(
            "export", "--model", model, *quantize, *order, *tokens, out
        )
        (perplexity,) = asyncio.run(perplexities(out, [LayerSelection()], arguments.tokens))
        pruned_first[depth] = perplexity
    return {
        "runs": {name: asdict(each) for name, each in runs.items()},
        "perplexity": table,
        "calibration_tokens": arguments.calibration_tokens,
        "bits": arguments.bits,
    }


def show(result: dict[str, object], console: Console) -> None:
    runs, perplexity = result["runs"], result["perplexity"]
    assert isinstance(runs, dict)
    assert isinstance(perplexity, dict)
    table = Table(title="Time and memory", title_justify="left")
    for heading in ("", "Seconds", "MiB", "MiB of the worker"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in runs.items():
        table.add_row(name, *(f"{value:.1f}" for value in each.values()))
    console.print(table)
    table = Table(title="Perplexity", title_justify="left")
    table.add_column("Depth", justify="right")
    for name in perplexity:
        table.add_column(name, justify="right")
    for depth in next(iter(perplexity.values())):
        table.add_row(str(depth), *(f"{column[depth]:.2f}" for column in perplexity.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 14, 12, 10, 8, 4])
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    fields = Settings.model_fields
    calibration_tokens = fields["calibration_tokens"].default
    parser.add_argument("--calibration-tokens", type=int, default=calibration_tokens)
    tokens = fields["quality_tokens"].default
    parser.add_argument("--tokens", type=int, default=tokens, help="of held-out text")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(arguments, Path(directory))
    show(result, Console())
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
