"""How much the order of the layers changes with the text that it is ranked on, and its size.

Each text is measured once, in one engine; what a smaller text would have given is the beginning
of it. Intervals are those of resampled windows; see :mod:`pruning.stability`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import typer

from bench.calibration import random_windows
from bench.measuring_engine import engine_windows, measured_model, measuring_engine
from bench.options import Options, names, option, pruned_depths
from bench.plots import save_lines
from bench.session import Session
from bench.texts import given_texts
from pruning.metrics import METRICS, DensePassSums, Metric
from pruning.metrics.base import Need
from pruning.stability import (
    Interval,
    Order,
    interval,
    kendall,
    order_of,
    overlap,
    resampled_orders,
    settlement,
    spearman,
)
from pruning.text import TextError
from server.calibration.text_windows import WINDOW
from server.engine.elastic.engine import ElasticEngine
from server.errors import InvalidArgument
from server.model.demo_corpus import Part

_RANDOM, _DOCUMENTATION = "random", "documentation"
_METRICS = tuple(name for name, metric in METRICS.items() if metric.need is Need.DENSE_PASS)
_SHARES = (0.9, 0.8, 0.65)


@dataclass(frozen=True)
class StabilityOptions(Options):
    texts: str = option(
        f"{_DOCUMENTATION},{_RANDOM}",
        "Texts to rank on: files, documentation for that of Python's standard library, random for "
        "random tokens.",
    )
    tokens: int = option(32768, "Tokens of each text.")
    metrics: str = option("block_influence", f"Metrics to rank by: {', '.join(_METRICS)}.")
    depths: str = option("", "Depths to compare at; none: 0.9, 0.8 and 0.65 of the layers.")


def run(options: StabilityOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: StabilityOptions) -> Session:
    metrics = [METRICS[name] for name in names(options.metrics, "--metrics", _METRICS)]
    if options.tokens < 2 * WINDOW:
        raise typer.BadParameter(f"--tokens: got {options.tokens}, allowed: {2 * WINDOW} or more")
    try:
        source = measured_model(options)
        texts = {_name(text): _load(text, options.tokens) for text in options.texts.split(",")}
    except (InvalidArgument, TextError) as error:
        raise typer.BadParameter(str(error)) from None
    engine = measuring_engine(options, source)
    session = Session("stability", options, {"name": source.title, "dtype": options.dtype})
    measured: dict[str, list[DensePassSums]] = {}
    with session.progress as progress:
        with progress.working("Starting the engine"):
            await engine.start()
        try:
            num_layers = engine.model.num_layers
            depths = pruned_depths(
                options.depths, num_layers, (max(int(num_layers * share), 1) for share in _SHARES)
            )
            for name, of_text in texts.items():
                measured[name] = await engine.measure_importance(
                    _windows(engine, of_text, options),
                    lambda *done, name=name: progress.advance(f"Measuring {name}", *done),
                )
        finally:
            await engine.shutdown()
    for metric in metrics:
        _compare(session, metric, measured, depths, num_layers)
    session.report.notes.append(
        "95 % of the resampled windows are within the bounds in brackets; a resample is noisier "
        "than the text, so most of them are below the value. Same layers: of those that a depth "
        "skips, the share that the other order skips there, too. Settled: the smallest share of "
        "the resamples of the text that skip the same layers as the text, over these depths"
    )
    session.finish(lambda stem: _plot(session, stem))
    return session


def _compare(
    session: Session,
    metric: Metric,
    measured: dict[str, list[DensePassSums]],
    depths: Sequence[int],
    num_layers: int,
) -> None:
    whole = {name: order_of(sums, metric) for name, sums in measured.items()}
    resampled = {name: resampled_orders(sums, metric) for name, sums in measured.items()}

    def add(
        text: str, sums: Sequence[DensePassSums], other: str, order: Order, *others: list[Order]
    ) -> None:
        """Compare the order on ``sums`` with ``order``, and the resamples of the two."""
        mine, against = others
        row: dict[str, Any] = {
            "metric": metric.name,
            "text": text,
            "tokens": sum(each.num_tokens for each in sums),
            "compared_with": other,
        }
        own = order_of(sums, metric)
        found = {
            correlation.__name__: interval(
                correlation(own, order),
                [correlation(a, b) for a, b in zip(mine, against, strict=True)],
            )
            for correlation in (spearman, kendall)
        }
        settled = settlement(sums, metric, [num_layers - depth for depth in depths])
        shares = {
            f"same_layers_at_{depth}": overlap(own, order, num_layers - depth) for depth in depths
        }
        least = None if settled is None else min(settled.agreement.values())
        session.report.summary.append(
            {**row, **{name: _text(each) for name, each in found.items()}, **shares}
            | {"settled": "-" if least is None else f"{least:.0%}"}
        )
        for name, each in found.items():
            row[name] = [each.value, each.low, each.high]
        session.add_round({**row, **shares, "settled": least, "order": list(own)})

    for name, sums in measured.items():
        for size in _sizes(len(sums)):
            part = sums[:size]
            of_part = resampled_orders(part, metric)
            add(name, part, f"all of {name}", whole[name], of_part, [whole[name]] * len(of_part))
    for first, second in combinations(measured, 2):
        add(
            first,
            measured[first],
            f"all of {second}",
            whole[second],
            resampled[first],
            resampled[second],
        )


def _sizes(num_groups: int) -> list[int]:
    """Return 2, 4, 8 and so on, and all of them."""
    sizes = []
    size = 2
    while size < num_groups:
        sizes.append(size)
        size *= 2
    return [*sizes, num_groups]


def _text(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _plot(session: Session, stem: Path) -> None:
    lines: dict[str, dict[float, float]] = {}
    for row in session.report.rounds:
        if row["compared_with"] == f"all of {row['text']}":
            line = lines.setdefault(f"{row['text']}, {row['metric']}", {})
            line[float(row["tokens"])] = row["spearman"][0]
    first = session.report.rounds[0]["metric"]
    save_lines(
        stem,
        lines,
        x_label="tokens",
        y_label="rank correlation with all of the text",
        title=session.title,
        dashed=[name for name in lines if not name.endswith(f", {first}")],
        from_zero=False,
        log_x=True,
    )


def _name(text: str) -> str:
    return text if text in (_RANDOM, _DOCUMENTATION) else Path(text).stem


def _load(text: str, num_tokens: int) -> Sequence[str] | None:
    """Return the documents of a text; None for random tokens."""
    if text == _RANDOM:
        return None
    return given_texts("" if text == _DOCUMENTATION else text, Part.CALIBRATION, num_tokens)


def _windows(
    engine: ElasticEngine, texts: Sequence[str] | None, options: StabilityOptions
) -> list[list[int]]:
    if texts is None:
        length = min(WINDOW, options.max_context - 1)
        return random_windows(options.tokens, length, engine.model.vocab_size, options.seed)
    return engine_windows(engine, texts, options.tokens)
