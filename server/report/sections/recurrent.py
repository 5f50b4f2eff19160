"""Models that are not transformers (table 3 of the paper)."""

from __future__ import annotations

from server.report.blocks import Block, Paragraph, Table, number
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.sections.base import Numbers

_KINDS = ("mamba", "rwkv")


class Recurrent:
    name = "recurrent"
    title = "Mamba and RWKV"
    measures = (
        "Whether layers are as redundant in models without attention (table 3): Block Influence of "
        "such a model, measured with transformers."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        architecture = lab.subject.architecture
        if not any(kind in architecture.lower() for kind in _KINDS):
            raise NotPossible(
                f"this model is none of them, but {architecture}; a report of a Mamba or RWKV "
                "model has it"
            )
        scores = (await lab.importance()).scores
        numbers["architecture"] = architecture
        numbers["lowest"], numbers["highest"] = min(scores), max(scores)
        numbers["below_a_tenth_of_highest"] = sum(each < max(scores) / 10 for each in scores)
        numbers["num_layers"] = len(scores)

    def render(self, numbers: Numbers) -> list[Block]:
        if "lowest" not in numbers:
            return []
        return [
            Paragraph(
                "The influence of each layer and the loss without it are in the sections above."
            ),
            Table(
                (
                    "Architecture",
                    "Layers",
                    "Lowest BI",
                    "Highest BI",
                    "Below a tenth of the highest",
                ),
                [
                    (
                        numbers["architecture"],
                        str(numbers["num_layers"]),
                        number(numbers["lowest"]),
                        number(numbers["highest"]),
                        str(numbers["below_a_tenth_of_highest"]),
                    )
                ],
            ),
        ]
