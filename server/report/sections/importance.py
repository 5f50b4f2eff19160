"""Block Influence of every layer (figure 1 of the paper)."""

from __future__ import annotations

from typing import Any

from pruning.depths import removal_order
from server.report.blocks import Block, Paragraph, Plot, Table, with_error
from server.report.lab import Lab
from server.report.paper import LAYERS_REMOVED
from server.report.plots import name_layers, use_log
from server.report.sections.base import Numbers


class Importance:
    name = "importance"
    title = "Block Influence of each layer"
    measures = (
        "1 minus the mean cosine between the residual stream before and after a layer, on the "
        "calibration text (equation 1, figure 1). The standard errors treat tokens as independent."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        measured = await lab.importance()
        numbers["num_tokens"] = measured.num_tokens
        numbers["layers"] = [
            {"layer": layer, "score": score, "stderr": stderr}
            for layer, (score, stderr) in enumerate(
                zip(measured.scores, measured.stderrs, strict=True)
            )
        ]
        numbers["removal_order"] = list(removal_order(measured.scores))

    def render(self, numbers: Numbers) -> list[Block]:
        if "layers" not in numbers:
            return []
        layers = numbers["layers"]
        order = numbers["removal_order"]
        place = {layer: number for number, layer in enumerate(order, start=1)}

        def draw(figure: Any, axes: Any) -> None:
            axes.bar(
                [row["layer"] for row in layers],
                [row["score"] for row in layers],
                yerr=[row["stderr"] for row in layers],
                error_kw={"elinewidth": 1},
            )
            use_log(axes.yaxis)
            name_layers(axes, layers[-1]["layer"], "layer")
            axes.set_ylabel("Block Influence")
            axes.grid(axis="x", visible=False)

        return [
            Paragraph(
                f"On {numbers['num_tokens']} tokens. Layers from the least important on: "
                f"{', '.join(map(str, order))}."
            ),
            Plot("block-influence", "Block Influence of each layer", draw),
            Table(
                ("Layer", "Block Influence", "Removed as number"),
                [
                    (
                        str(row["layer"]),
                        with_error(row["score"], row["stderr"]),
                        str(place[row["layer"]]),
                    )
                    for row in layers
                ],
            ),
            LAYERS_REMOVED,
        ]
