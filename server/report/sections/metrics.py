"""Every importance metric side by side (figure 4 of the paper)."""

from __future__ import annotations

from server.engine.base import LayerSelection
from server.report.blocks import Block, Table, not_measured, number
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.rank_correlation import spearman
from server.report.sections.base import Numbers
from server.report.sections.depth import NAMES


class Metrics:
    name = "metrics"
    title = "Importance metrics side by side"
    measures = (
        "The place of each layer in the order of every metric, and the rank correlation of its "
        "scores with the divergence that leaving out the layer alone causes on held-out text. "
        "Single and greedy removal were searched for on the calibration text."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        numbers["metrics"], numbers["missing"] = {}, {}
        losses: list[float] = []
        singles = [LayerSelection((layer,), (layer,)) for layer in range(lab.num_layers)]
        async for _, quality in lab.qualities(singles, "Single removals"):
            losses.append(quality.kl_nats or 0.0)
        for metric in NAMES:
            try:
                ranking = await lab.ranking(metric)
            except NotPossible as error:
                numbers["missing"][metric] = str(error)
                continue
            numbers["metrics"][metric] = {
                "removal_order": list(ranking.removal_order),
                "scores": list(ranking.scores),
                "spearman_kl_nats": spearman(ranking.scores, losses),
            }

    def render(self, numbers: Numbers) -> list[Block]:
        measured = numbers.get("metrics")
        if not measured:
            return []
        places = {
            metric: {layer: place for place, layer in enumerate(each["removal_order"], start=1)}
            for metric, each in measured.items()
        }
        num_layers = len(next(iter(places.values())))
        return [
            *not_measured((NAMES[metric], why) for metric, why in numbers["missing"].items()),
            Table(
                ("Metric", "Spearman with the loss of single layers", "First five to go"),
                [
                    (
                        NAMES[metric],
                        number(each["spearman_kl_nats"]),
                        ", ".join(map(str, each["removal_order"][:5])),
                    )
                    for metric, each in measured.items()
                ],
            ),
            Table(
                ("Layer", *(NAMES[metric] for metric in measured)),
                [
                    (str(layer), *(str(of_metric[layer]) for of_metric in places.values()))
                    for layer in range(num_layers)
                ],
                "As which of the layers each one goes; 1: first",
            ),
        ]
