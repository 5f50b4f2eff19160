"""Quantization together with pruning (tables 4 and 5 of the paper)."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pruning.depths import skipped_layers
from pruning.metrics.names import BLOCK_INFLUENCE
from pruning.quality import Quality
from server.engine.base import LayerSelection
from server.engine.elastic.compatibility import check_quantized_kernels, packed_weights_problem
from server.errors import FathomError
from server.report.blocks import Block, Paragraph, Plot, Table, number
from server.report.lab import Lab
from server.report.quantizer import BITS, Quantizer
from server.report.sections.base import Numbers
from server.report.sections.depth import depths_at

_SHARES = (0.1, 0.2, 0.27)
_PROMPT_TOKENS = 256
_NUM_STREAMS = 8
_KINDS = {
    "unquantized": "not quantized",
    "quantized": "quantized, then pruned",
    "pruned_first": "pruned, then quantized",
}
# Whose speed is measured, and what it is called among the numbers.
_SPEEDS = {"unquantized": "tokens_per_second", "quantized": "quantized_tokens_per_second"}


class Quantization:
    name = "quantization"
    title = "Quantization and depth"
    measures = (
        f"Perplexity of the model in {BITS} bits (GPTQ) at several depths in the order of Block "
        "Influence, both orders of quantizing and pruning, and the throughput (tables 4 and 5). "
        "Perplexity with transformers, which computes with the quantized weights unpacked, on all "
        "tokens but the first of each window. Throughput with the engine: generated tokens per "
        f"second of {_NUM_STREAMS} requests at a time, their prompts of {_PROMPT_TOKENS} tokens "
        "included; the depths take turns, first unquantized, then quantized."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        quantizer = Quantizer(lab)
        ranking = await lab.ranking(BLOCK_INFLUENCE)
        order, scores = ranking.removal_order, (await lab.importance()).scores
        depths = [lab.num_layers, *depths_at(lab.num_layers, _SHARES)]
        rows: list[dict[str, Any]] = [{"depth": depth} for depth in depths]
        numbers["rows"] = rows
        checkpoint: Path | None = None

        async def whole() -> Path:
            nonlocal checkpoint
            if checkpoint is None:
                checkpoint = await quantizer.whole()
            return checkpoint

        for kind in ("unquantized", "quantized"):
            for row in rows:

                async def measure(kind: str = kind, depth: int = row["depth"]) -> Quality:
                    where = await whole() if kind == "quantized" else None
                    meter = await lab.transformers()
                    return meter.quality(lab.held_out, skipped_layers(order, depth), where)

                row[kind] = asdict(await self._kept(lab, kind, row["depth"], measure))
        for row in rows[1:]:

            async def measure_pruned(depth: int = row["depth"]) -> Quality:
                out = await quantizer.pruned_first(depth, ranking, scores)
                meter = await lab.transformers()
                try:
                    return meter.quality(
                        lab.held_out, skipped_layers(order, depth), out, of_depth=True
                    )
                finally:
                    shutil.rmtree(out, ignore_errors=True)

            row["pruned_first"] = asdict(
                await self._kept(lab, "pruned_first", row["depth"], measure_pruned)
            )
        if problem := packed_weights_problem():
            numbers["no_throughput"] = problem
            return
        try:
            check_quantized_kernels(BITS, lab.settings.dtype)
        except FathomError as error:
            numbers["no_throughput"] = str(error)
            return
        skips = [skipped_layers(order, depth) for depth in depths]
        selections = [LayerSelection(skipped, skipped) for skipped in skips]
        for kind, name in _SPEEDS.items():
            quantized = whole if kind == "quantized" else None
            what = f"Speed in {BITS} bits and depth" if quantized else "Speed by depth"
            paces = await lab.paces(selections, _PROMPT_TOKENS, _NUM_STREAMS, what, quantized)
            for row, pace in zip(rows, paces, strict=True):
                row[name] = pace.tokens_per_second

    async def _kept(self, lab: Lab, kind: str, depth: int, measure: Any) -> Quality:
        lab.progress.advance(f"Quality in {BITS} bits and depth", 0, 1)
        key = {
            **lab.held_out_key,
            **lab.text_key,
            "quality_tokens": lab.settings.quality_tokens,
            "kind": kind,
            "depth": depth,
        }
        return await lab.kept("quantized-quality", Quality, key, measure)

    def render(self, numbers: Numbers) -> list[Block]:
        rows = [row for row in numbers.get("rows", []) if "unquantized" in row]
        if not rows:
            return []
        blocks: list[Block] = []
        if "no_throughput" in numbers:
            blocks.append(
                Paragraph(f"No throughput of quantized weights here: {numbers['no_throughput']}.")
            )
        title = "Perplexity in 16 or 32 bits and in 4, by layers left out"
        blocks.append(Plot("quantization", title, lambda _, axes: _draw(axes, rows)))
        headings = ["Depth", *(f"{label.capitalize()}: perplexity" for label in _KINDS.values())]
        speeds = list(_SPEEDS.values()) if "tokens_per_second" in rows[0] else []
        if speeds:
            title = "Perplexity against throughput, by number of layers"
            blocks.append(
                Plot("quantization-speed", title, lambda _, axes: _draw_trade(axes, rows))
            )
            headings += ["Not quantized: tok/s", "Quantized: tok/s"]
        cells = [
            (
                str(row["depth"]),
                *(number(row[kind]["perplexity"], 4) if kind in row else "-" for kind in _KINDS),
                *(number(row.get(speed)) for speed in speeds),
            )
            for row in rows
        ]
        return [*blocks, Table(headings, cells)]


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    num_layers = rows[0]["depth"]
    for marker, (kind, label) in zip("osD", _KINDS.items(), strict=True):
        points = [
            (100 * (1 - row["depth"] / num_layers), row[kind]["perplexity"])
            for row in rows
            if kind in row
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
    axes.set_xlabel("layers left out, %")
    axes.set_ylabel("perplexity")
    axes.legend()


def _draw_trade(axes: Any, rows: list[dict[str, Any]]) -> None:
    for marker, (kind, speed) in zip("os", _SPEEDS.items(), strict=True):
        points = [
            (row[speed], row[kind]["perplexity"], row["depth"])
            for row in rows
            if speed in row and kind in row
        ]
        if points:
            *along, depths = zip(*points, strict=True)
            axes.plot(*along, marker=marker, markersize=4, label=_KINDS[kind])
            for x, y, depth in zip(*along, depths, strict=True):
                axes.annotate(str(depth), (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens per second")
    axes.set_ylabel("perplexity")
    axes.legend()
