"""Attention against feed-forward removal, layer by layer (table 1 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pruning.quality import Quality
from pruning.sublayers import SublayerInfluence
from server.report.blocks import Block, Paragraph, Plot, Table, number, with_error
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.plots import name_layers, use_log
from server.report.sections.base import Numbers

_MAX_TOKENS = 2048
_PARTS = ("attention", "feed_forward")


@dataclass(frozen=True, slots=True)
class _WithoutParts:
    """The quality without the attention of a layer, and without its feed-forward."""

    attention: Quality
    feed_forward: Quality


class Sublayers:
    name = "sublayers"
    title = "Attention against feed-forward"
    measures = (
        "Block Influence of the two parts of each layer, and the perplexity without each part "
        f"alone, on at most {_MAX_TOKENS} tokens of the held-out text (table 1). Measured with "
        "transformers, on all tokens but the first of each window."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        async def influence() -> SublayerInfluence:
            meter = await lab.transformers()
            try:
                return meter.sublayer_influence(lab.windows, lab.reporting("Parts of layers"))
            except ValueError as error:
                raise NotPossible(str(error)) from None

        measured = await lab.kept("sublayers", SublayerInfluence, lab.text_key, influence)
        windows: list[list[int]] = []
        rows: list[dict[str, Any]] = [
            {
                "layer": layer,
                "influence": {part: getattr(measured, part).scores[layer] for part in _PARTS},
                "influence_stderr": {
                    part: getattr(measured, part).stderrs[layer] for part in _PARTS
                },
            }
            for layer in range(lab.num_layers)
        ]
        numbers["layers"] = rows
        for layer, row in enumerate(rows):

            async def without(layer: int = layer) -> _WithoutParts:
                meter = await lab.transformers()
                nonlocal windows
                windows = windows or _first_windows(lab)
                qualities = meter.part_qualities(windows, layer)
                return _WithoutParts(qualities["attention"], qualities["feed_forward"])

            key = {**lab.held_out_key, "layer": layer, "max_tokens": _MAX_TOKENS}
            qualities = await lab.kept("without-parts", _WithoutParts, key, without)
            row["log_perplexity"] = {
                part: math.log(getattr(qualities, part).perplexity) for part in _PARTS
            }
            row["kl_nats"] = {part: getattr(qualities, part).kl_nats for part in _PARTS}
            lab.progress.advance("Without parts of layers", layer + 1, lab.num_layers)
        for part in _PARTS:
            values = [row["kl_nats"][part] for row in rows]
            numbers[f"mean_kl_nats_{part}"] = math.fsum(values) / len(values)

    def render(self, numbers: Numbers) -> list[Block]:
        rows = numbers.get("layers")
        if not rows:
            return []
        done = [row for row in rows if "kl_nats" in row]
        labels = {"attention": "attention", "feed_forward": "feed-forward"}

        def draw_influence(figure: Any, axes: Any) -> None:
            _draw(axes, rows, "influence", labels)
            axes.set_ylabel("Block Influence")

        def draw_loss(figure: Any, axes: Any) -> None:
            _draw(axes, done, "kl_nats", labels)
            axes.set_ylabel("KL from the dense model, nats")

        blocks: list[Block] = []
        if "mean_kl_nats_attention" in numbers:
            blocks.append(
                Paragraph(
                    "Mean divergence over the layers: without attention "
                    f"{number(numbers['mean_kl_nats_attention'])} nats, without feed-forward "
                    f"{number(numbers['mean_kl_nats_feed_forward'])} nats."
                )
            )
        blocks.append(
            Plot("sublayer-influence", "Block Influence of the parts of each layer", draw_influence)
        )
        if done:
            blocks.append(Plot("sublayer-loss", "Divergence without a part of a layer", draw_loss))
        blocks.append(
            Table(
                (
                    "Layer",
                    "Attention, BI",
                    "Feed-forward, BI",
                    "Without attention, KL",
                    "Without feed-forward, KL",
                ),
                [
                    (
                        str(row["layer"]),
                        *(
                            with_error(row["influence"][part], row["influence_stderr"][part])
                            for part in _PARTS
                        ),
                        *(number(row.get("kl_nats", {}).get(part)) for part in _PARTS),
                    )
                    for row in rows
                ],
            )
        )
        return blocks


def _draw(axes: Any, rows: list[dict[str, Any]], field: str, labels: dict[str, str]) -> None:
    for part, label in labels.items():
        axes.plot(
            [row["layer"] for row in rows],
            [row[field][part] for row in rows],
            marker="o" if part == "attention" else "s",
            markersize=4,
            label=label,
        )
    use_log(axes.yaxis)
    name_layers(axes, rows[-1]["layer"], "layer")
    axes.legend()


def _first_windows(lab: Lab) -> list[list[int]]:
    windows: list[list[int]] = []
    for window in lab.held_out:
        if len(windows) >= 2 and sum(map(len, windows)) + len(window) > _MAX_TOKENS:
            break
        windows.append(window)
    return windows
