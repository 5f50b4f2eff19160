"""What is lost without each layer alone, against its Block Influence (figures 3 and 4)."""

from __future__ import annotations

import math
from typing import Any

from server.engine.base import LayerSelection
from server.report.blocks import Block, Paragraph, Plot, Table, number, with_error
from server.report.lab import Lab
from server.report.plots import name_layers, use_log
from server.report.rank_correlation import spearman
from server.report.sections.base import Numbers


class SingleRemoval:
    name = "single-removal"
    title = "Loss without each layer alone"
    measures = (
        "Perplexity on held-out text, and divergence from the dense model, without one layer at a "
        "time, against the layer's Block Influence (figures 3 and 4). The ratio to the dense "
        "model's perplexity has a standard error of its own, as both see the same text."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        influence = (await lab.importance()).scores
        rows: list[dict[str, Any]] = []
        numbers["layers"] = rows
        singles = [LayerSelection((layer,), (layer,)) for layer in range(lab.num_layers)]
        dense: float | None = None
        async for layers, quality in lab.qualities([lab.dense, *singles], "Single removals"):
            if dense is None:
                dense = numbers["dense_perplexity"] = quality.perplexity
                numbers["num_tokens"] = quality.num_tokens
                continue
            [layer] = layers.decode_skips
            rows.append(
                {
                    "layer": layer,
                    "influence": influence[layer],
                    "perplexity": quality.perplexity,
                    "log_ratio": math.log(quality.perplexity / dense),
                    "log_ratio_stderr": quality.log_ratio_stderr,
                    "kl_nats": quality.kl_nats,
                }
            )
        for loss in ("log_ratio", "kl_nats"):
            losses = [row[loss] for row in rows]
            numbers[f"spearman_{loss}"] = spearman(influence, losses)

    def render(self, numbers: Numbers) -> list[Block]:
        rows = numbers.get("layers")
        if not rows:
            return []

        def draw_layers(figure: Any, axes: Any) -> None:
            axes.bar(
                [row["layer"] for row in rows],
                [row["log_ratio"] for row in rows],
                yerr=[row["log_ratio_stderr"] or 0 for row in rows],
                color="C3",
                error_kw={"elinewidth": 1},
            )
            use_log(axes.yaxis, linear_below=0.1)
            name_layers(axes, rows[-1]["layer"], "layer that is left out")
            axes.set_ylabel("ln(perplexity / dense)")
            axes.grid(axis="x", visible=False)

        def draw_scatter(figure: Any, axes: Any) -> None:
            axes.errorbar(
                [row["influence"] for row in rows],
                [max(row["kl_nats"] or 0.0, 1e-6) for row in rows],
                fmt="o",
                markersize=4,
            )
            for row in rows:
                axes.annotate(
                    str(row["layer"]),
                    (row["influence"], max(row["kl_nats"] or 0.0, 1e-6)),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
            use_log(axes.xaxis)
            use_log(axes.yaxis)
            axes.set_xlabel("Block Influence")
            axes.set_ylabel("KL from the dense model without it, nats")

        blocks: list[Block] = []
        if numbers.get("spearman_kl_nats") is not None:
            blocks.append(
                Paragraph(
                    "Spearman's rank correlation of Block Influence with ln(perplexity / dense): "
                    f"{numbers['spearman_log_ratio']:.2f}; with the divergence: "
                    f"{numbers['spearman_kl_nats']:.2f}. 1 means that it ranks single layers as "
                    "their loss does."
                )
            )
        return [
            *blocks,
            Plot("single-removal", "Loss of perplexity without each layer alone", draw_layers),
            Plot("influence-and-loss", "Block Influence and loss of each layer", draw_scatter),
            Table(
                ("Without layer", "Block Influence", "Perplexity", "ln(ratio)", "KL, nats"),
                [
                    (
                        str(row["layer"]),
                        number(row["influence"]),
                        number(row["perplexity"], 4),
                        with_error(row["log_ratio"], row["log_ratio_stderr"]),
                        number(row["kl_nats"]),
                    )
                    for row in rows
                ],
                f"Dense: perplexity {number(numbers['dense_perplexity'], 4)} on "
                f"{numbers['num_tokens']} tokens",
            ),
        ]
