"""Quality, time to first token and throughput over prefill depth and decode depth."""

from __future__ import annotations

import math
from typing import Any

from pruning.metrics.names import BLOCK_INFLUENCE, GREEDY_KL
from server.engine.base import LayerSelection
from server.report.blocks import Block, Paragraph, Plot, Table, number
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.sections.base import Numbers
from server.report.sections.depth import NAMES, depths_at

_SHARES = (0.1, 0.2, 0.33, 0.5)
_PROMPT_TOKENS = 256
_NUM_STREAMS = 8


class Surface:
    name = "surface"
    title = "Prefill depth and decode depth"
    measures = (
        "A prompt may run fewer layers than the tokens generated after it, or more. Quality: "
        "perplexity of the second half of each window, which runs as generated tokens do, given "
        "the first half, which runs as a prompt does. Time to first token of one request alone; "
        f"generated tokens per second of {_NUM_STREAMS} requests at a time, their prompts included."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        lab.check_elastic()
        metric, repaired = await _order(lab)
        numbers["order"] = NAMES[metric] + (" + repair" if repaired else "")
        depths = [lab.num_layers, *depths_at(lab.num_layers, _SHARES)]
        numbers["depths"], numbers["cells"] = depths, []
        cells: dict[LayerSelection, dict[str, Any]] = {}
        for decode in depths:
            for prefill in depths:
                layers = await lab.selection(metric, decode, repaired=repaired, prefill=prefill)
                cells[layers] = {"prefill": prefill, "decode": decode}
        dense = None
        async for layers, quality in lab.qualities(list(cells), "Quality of the surface"):
            dense = quality.perplexity if dense is None else dense
            cells[layers] |= {
                "perplexity": quality.perplexity,
                "of_dense": quality.perplexity / dense,
                "kl_nats": quality.kl_nats,
            }
            numbers["cells"].append(cells[layers])
        paces = await lab.paces(list(cells), _PROMPT_TOKENS, _NUM_STREAMS, "Speed of the surface")
        for cell, pace in zip(cells.values(), paces, strict=True):
            cell["first_token_seconds"] = pace.first_token_seconds
            cell["tokens_per_second"] = pace.tokens_per_second
            numbers["prompt_tokens"] = pace.prompt_tokens

    def render(self, numbers: Numbers) -> list[Block]:
        cells = numbers.get("cells")
        if not cells:
            return []
        depths = numbers["depths"]
        blocks: list[Block] = [
            Paragraph(
                f"In the order of {numbers['order']}."
                + (
                    f" Speed with prompts of {numbers['prompt_tokens']} tokens, on this machine "
                    "and with whatever else ran on it."
                    if "prompt_tokens" in numbers
                    else ""
                )
            )
        ]
        for field, title, digits in (
            ("of_dense", "Perplexity / dense", 3),
            ("first_token_seconds", "Seconds to the first token", 3),
            ("tokens_per_second", "Generated tokens per second", 3),
        ):
            if any(cell.get(field) is not None for cell in cells):
                blocks.append(_heat_map(field, title, digits, cells, depths))
        blocks.append(
            Table(
                (
                    "Prefill",
                    "Decode",
                    "Perplexity",
                    "Of dense",
                    "KL, nats",
                    "First token, s",
                    "Tok/s",
                ),
                [
                    (
                        str(cell["prefill"]),
                        str(cell["decode"]),
                        number(cell["perplexity"], 4),
                        number(cell["of_dense"]),
                        number(cell["kl_nats"]),
                        number(cell.get("first_token_seconds")),
                        number(cell.get("tokens_per_second")),
                    )
                    for cell in cells
                ],
            )
        )
        return blocks


async def _order(lab: Lab) -> tuple[str, bool]:
    """Return the metric of the order, and whether there is repair: the best that can be had."""
    try:
        await lab.ranking(GREEDY_KL, await lab.repair())
    except NotPossible:
        return BLOCK_INFLUENCE, False
    return GREEDY_KL, True


def _heat_map(
    field: str, title: str, digits: int, cells: list[dict[str, Any]], depths: list[int]
) -> Plot:
    values = {(cell["prefill"], cell["decode"]): cell.get(field) for cell in cells}

    def draw(figure: Any, axes: Any) -> None:
        import numpy as np

        grid = np.array(
            [[values.get((prefill, decode)) for prefill in depths] for decode in depths], float
        )
        # What is not a number stays white.
        mesh = axes.pcolormesh(np.log(np.where(grid > 0, grid, math.nan)), cmap="viridis")
        low, high = mesh.get_clim()
        for row, decode in enumerate(depths):
            for column, prefill in enumerate(depths):
                value = values.get((prefill, decode))
                if value:
                    is_dark = math.log(value) < (low + high) / 2
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        number(value, digits),
                        ha="center",
                        va="center",
                        color="#ffffff" if is_dark else "#000000",
                        fontsize=9,
                    )
        ticks = [place + 0.5 for place in range(len(depths))]
        axes.set_xticks(ticks, [str(depth) for depth in depths])
        axes.set_yticks(ticks, [str(depth) for depth in depths])
        axes.set_xlabel("prefill depth")
        axes.set_ylabel("decode depth")
        axes.grid(visible=False)

    return Plot(f"surface-{field.replace('_', '-')}", title, draw)
