"""Multiple-choice tasks at each level (table 2 of the paper)."""

from __future__ import annotations

import math
from typing import Any

from pruning.metrics.names import BLOCK_INFLUENCE, GREEDY_KL
from server.engine.base import LayerSelection
from server.report.blocks import Block, Plot, Table, not_measured, percent
from server.report.lab import Lab
from server.report.levels import found_policy
from server.report.not_possible import NotPossible
from server.report.paper import RETENTION
from server.report.sections.base import Numbers
from server.report.sections.depth import NAMES, depths_at

_ORDERS = ((BLOCK_INFLUENCE, False), (GREEDY_KL, True))
# The share that the paper's main table is about, and two before it.
_SHARES = (0.1, 0.2, 0.27)


class Tasks:
    name = "tasks"
    title = "Tasks at each level"
    measures = (
        "Accuracy on the questions of --questions, by log-likelihood per character, at each level "
        "and at some prune ratios, with the standard error of the share; retention is the mean "
        "accuracy divided by the dense model's (table 2)."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        if not lab.options.questions:
            raise NotPossible("no questions were given; --questions FILE names some")
        lab.check_elastic()
        numbers["num_layers"] = lab.num_layers
        numbers["rows"], numbers["missing"] = [], []
        numbers["files"] = list(lab.options.questions)
        await self._ask(lab, numbers, "dense", "", lab.dense)
        for metric, repaired in _ORDERS:
            order = NAMES[metric] + (" + repair" if repaired else "")
            try:
                policy = await found_policy(lab, metric, repaired=repaired)
                levels = [
                    (f"level {level.name}", policy.selection(level.depths))
                    for level in policy.levels
                    if level.depths != policy.dense
                ]
                for depth in depths_at(lab.num_layers, _SHARES):
                    layers = await lab.selection(metric, depth, repaired=repaired)
                    levels.append((f"depth {depth}", layers))
            except NotPossible as error:
                numbers["missing"].append({"order": order, "why": str(error)})
                continue
            for name, layers in levels:
                await self._ask(lab, numbers, name, order, layers)

    async def _ask(
        self, lab: Lab, numbers: Numbers, name: str, order: str, layers: LayerSelection
    ) -> None:
        row: dict[str, Any] = {
            "name": name,
            "order": order,
            "prefill_layers": lab.num_layers - len(layers.prefill_skips),
            "decode_layers": lab.num_layers - len(layers.decode_skips),
            "accuracy": {},
        }
        for file, questions in lab.options.questions.items():
            what = f"{file}, {order} {name}".replace("  ", " ")
            found = await lab.accuracy(file, questions, layers, what)
            row["accuracy"][file] = {
                "share": found.share,
                "stderr": found.stderr,
                "num_questions": found.num_questions,
            }
        shares = [each["share"] for each in row["accuracy"].values()]
        errors = [each["stderr"] for each in row["accuracy"].values()]
        row["mean"] = math.fsum(shares) / len(shares)
        row["mean_stderr"] = math.hypot(*errors) / len(errors)
        dense = numbers["rows"][0]["mean"] if numbers["rows"] else row["mean"]
        row["retention"] = row["mean"] / dense if dense else None
        numbers["rows"].append(row)

    def render(self, numbers: Numbers) -> list[Block]:
        rows = numbers.get("rows")
        if not rows:
            return [RETENTION]

        def draw(figure: Any, axes: Any) -> None:
            dense, *others = rows
            for order in dict.fromkeys(row["order"] for row in others):
                points = sorted(
                    (
                        100 * (1 - row["decode_layers"] / numbers["num_layers"]),
                        100 * row["mean"],
                        100 * row["mean_stderr"],
                    )
                    for row in [dense, *others]
                    if row["order"] in ("", order) and row["prefill_layers"] == row["decode_layers"]
                )
                x, y, error = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=error, marker="o", capsize=2, label=order)
            axes.set_xlabel("layers left out, %")
            axes.set_ylabel("mean accuracy, %")
            if others:
                axes.legend()

        return [
            *not_measured((each["order"], each["why"]) for each in numbers["missing"]),
            Plot("tasks", "Mean accuracy against the share of layers that are left out", draw),
            Table(
                ("Order", "Level", "Prefill", "Decode", *numbers["files"], "Mean", "Retention"),
                [
                    (
                        row["order"] or "-",
                        row["name"],
                        str(row["prefill_layers"]),
                        str(row["decode_layers"]),
                        *(
                            f"{100 * row['accuracy'][file]['share']:.1f} ± "
                            f"{100 * row['accuracy'][file]['stderr']:.1f} %"
                            for file in numbers["files"]
                        ),
                        percent(row["mean"]),
                        percent(row["retention"]),
                    )
                    for row in rows
                ],
            ),
            RETENTION,
        ]
