"""Quality against prune ratio, by metric, with repair and without (figures 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pruning.metrics.names import (
    ANGULAR_DISTANCE,
    BLOCK_INFLUENCE,
    GREEDY_KL,
    NORM,
    RELATIVE_MAGNITUDE,
    REVERSE_ORDER,
    SEQUENTIAL,
    SINGLE_REMOVAL_KL,
)
from server.engine.base import LayerSelection
from server.report.blocks import Block, Plot, Table, not_measured, number
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.plots import use_log
from server.report.sections.base import Numbers

# Measured at every depth down to a half, with repair and without; the others at some depths.
_MAIN = (BLOCK_INFLUENCE, GREEDY_KL)
_OTHERS = (
    SINGLE_REMOVAL_KL,
    RELATIVE_MAGNITUDE,
    ANGULAR_DISTANCE,
    REVERSE_ORDER,
    SEQUENTIAL,
    NORM,
)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
_MAX_DEPTHS = 16
_NUM_CRITICAL = 5
_MARKERS = "osD^vP*X"
NAMES = {
    BLOCK_INFLUENCE: "Block Influence",
    RELATIVE_MAGNITUDE: "relative magnitude",
    NORM: "norm",
    REVERSE_ORDER: "reverse order",
    SEQUENTIAL: "sequential",
    ANGULAR_DISTANCE: "angular distance",
    SINGLE_REMOVAL_KL: "single removal",
    GREEDY_KL: "greedy removal",
}
_RANK = {metric: place for place, metric in enumerate((*_MAIN, *_OTHERS))}


def depths_at(num_layers: int, shares: Sequence[float]) -> list[int]:
    """Return the depths that leave out these shares of the layers, none twice, dense left out."""
    depths = [num_layers - max(round(num_layers * share), 1) for share in shares]
    return [depth for depth in dict.fromkeys(depths) if depth > 0]


def down_to_half(num_layers: int) -> list[int]:
    """Return every depth from one layer less to a half, or some where there are many."""
    depths = list(range(num_layers - 1, max(num_layers // 2, 1) - 1, -1))
    step = math.ceil(len(depths) / _MAX_DEPTHS)
    return depths[::step]


class DepthQuality:
    name = "depth"
    title = "Quality against prune ratio"
    measures = (
        "Perplexity on held-out text and divergence from the dense model at each depth, with the "
        "layers in the order of each metric; with repair a linear map, fitted once for each layer "
        "in closed form on the calibration text, stands in for each layer that is left out "
        "(figures 5 and 6)."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        dense = await lab.quality(lab.dense, "Dense quality")
        numbers["num_layers"] = lab.num_layers
        numbers["dense"] = {"perplexity": dense.perplexity, "num_tokens": dense.num_tokens}
        numbers["rows"], numbers["missing"] = [], []
        numbers["critical"] = []
        fine = down_to_half(lab.num_layers)
        coarse = depths_at(lab.num_layers, _SHARES)
        await self._measure(lab, numbers, BLOCK_INFLUENCE, fine, repaired=False)
        numbers["critical"] = await _critical(lab, numbers)
        await self._measure(lab, numbers, BLOCK_INFLUENCE, fine, repaired=True)
        for repaired in (False, True):
            await self._measure(lab, numbers, GREEDY_KL, fine, repaired=repaired)
        for repaired in (False, True):
            for metric in _OTHERS:
                await self._measure(lab, numbers, metric, coarse, repaired=repaired)

    async def _measure(
        self, lab: Lab, numbers: Numbers, metric: str, depths: Sequence[int], *, repaired: bool
    ) -> None:
        label = NAMES[metric] + (" + repair" if repaired else "")
        try:
            by_layers: dict[LayerSelection, int] = {}
            for depth in depths:
                by_layers[await lab.selection(metric, depth, repaired=repaired)] = depth
        except NotPossible as error:
            numbers["missing"].append({"metric": metric, "repair": repaired, "why": str(error)})
            return
        dense = numbers["dense"]["perplexity"]
        async for layers, quality in lab.qualities(list(by_layers), f"Quality, {label}"):
            depth = by_layers[layers]
            numbers["rows"].append(
                {
                    "metric": metric,
                    "repair": repaired,
                    "depth": depth,
                    "skipped": list(layers.decode_skips),
                    "prune_ratio": 1 - depth / lab.num_layers,
                    "perplexity": quality.perplexity,
                    "perplexity_stderr": quality.perplexity_stderr,
                    "of_dense": quality.perplexity / dense,
                    "kl_nats": quality.kl_nats,
                    "agreement": quality.agreement,
                }
            )

    def render(self, numbers: Numbers) -> list[Block]:
        rows = numbers.get("rows")
        if not rows:
            return []
        blocks: list[Block] = [
            _lines("perplexity", "of_dense", "perplexity / dense", rows, repaired=False),
            _lines("divergence", "kl_nats", "KL from the dense model, nats", rows, repaired=False),
        ]
        if any(row["repair"] for row in rows):
            blocks.append(
                _lines(
                    "perplexity-repaired",
                    "of_dense",
                    "perplexity / dense, with repair",
                    rows,
                    repaired=True,
                )
            )
        blocks += _tables(rows, numbers)
        if numbers["critical"]:
            blocks += _critical_blocks(numbers["critical"])
        blocks += not_measured(
            (NAMES[each["metric"]] + (" with repair" if each["repair"] else ""), each["why"])
            for each in numbers["missing"]
        )
        return blocks


async def _critical(lab: Lab, numbers: Numbers) -> list[dict[str, Any]]:
    """Return what each further layer of Block Influence's order costs, the dearest first."""
    order = (await lab.ranking(BLOCK_INFLUENCE)).removal_order
    depth, before = lab.num_layers, numbers["dense"]["perplexity"]
    steps = []
    for row in numbers["rows"]:
        layers = list(order[lab.num_layers - depth : lab.num_layers - row["depth"]])
        cost = math.log(row["perplexity"] / before) / len(layers)
        steps.append({"depth": row["depth"], "layers": layers, "cost": cost})
        depth, before = row["depth"], row["perplexity"]
    return steps


def _critical_blocks(steps: list[dict[str, Any]]) -> list[Block]:
    dearest = sorted(steps, key=lambda step: -step["cost"])[:_NUM_CRITICAL]

    def draw(figure: Any, axes: Any) -> None:
        axes.bar([step["depth"] for step in steps], [step["cost"] for step in steps], color="C3")
        axes.invert_xaxis()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("depth after the removal")
        axes.set_ylabel("ln(perplexity) gained by the step")
        axes.grid(axis="x", visible=False)

    return [
        Plot("critical-layers", "What one more removal costs, in Block Influence's order", draw),
        Table(
            ("Layer", "Depth after it", "ln(perplexity) gained", "Perplexity times"),
            [
                (
                    ", ".join(map(str, step["layers"])),
                    str(step["depth"]),
                    number(step["cost"]),
                    number(math.exp(step["cost"])),
                )
                for step in dearest
            ],
            "Critical layers: where one more removal in Block Influence's order costs most",
        ),
    ]


def _lines(
    name: str, field: str, label: str, rows: list[dict[str, Any]], *, repaired: bool
) -> Plot:
    def draw(figure: Any, axes: Any) -> None:
        for place, (metric, text) in enumerate(NAMES.items()):
            points = [
                (100 * row["prune_ratio"], row[field])
                for row in rows
                if row["metric"] == metric and row["repair"] is repaired and row[field]
            ]
            if points:
                # Orders may be the same, so lines can lie on each other.
                axes.plot(
                    *zip(*points, strict=True),
                    marker=_MARKERS[place],
                    markersize=4 if place else 5,
                    linestyle="--" if place % 2 else "-",
                    linewidth=2.2 if metric in _MAIN else 1.2,
                    label=text,
                )
        use_log(axes.yaxis)
        axes.set_xlabel("layers left out, %")
        axes.set_ylabel(label)
        axes.legend(ncols=2)

    return Plot(name, f"{label} against the share of layers that are left out", draw)


def _tables(rows: list[dict[str, Any]], numbers: Numbers) -> list[Table]:
    """Return a table of each figure, with a line for each order and a column for each depth."""
    dense = (
        f"dense: perplexity {number(numbers['dense']['perplexity'], 4)} on "
        f"{numbers['dense']['num_tokens']} tokens; report.json has all depths"
    )
    depths = [
        depth
        for depth in depths_at(numbers["num_layers"], _SHARES)
        if any(row["depth"] == depth for row in rows)
    ]
    cells = {(row["metric"], row["repair"], row["depth"]): row for row in rows}
    lines = list(dict.fromkeys((row["metric"], row["repair"]) for row in rows))
    shown = {
        "of_dense": f"Perplexity / dense by depth ({dense})",
        "kl_nats": "KL from the dense model by depth, nats",
    }
    return [
        Table(
            ("Order", *map(str, depths)),
            [
                (
                    NAMES[metric] + (" + repair" if repaired else ""),
                    *(
                        number(cells.get((metric, repaired, depth), {}).get(field))
                        for depth in depths
                    ),
                )
                for metric, repaired in sorted(lines, key=lambda line: _RANK[line[0]])
            ],
            caption,
        )
        for field, caption in shown.items()
    ]
