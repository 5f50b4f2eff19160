"""Healed maps against those in closed form (table 6 of the paper)."""

from __future__ import annotations

from typing import Any

from pruning.metrics.names import BLOCK_INFLUENCE
from pruning.repair.healing_job import HealingReport
from server.model.offline_healing import OfflineHealing
from server.report.blocks import Block, Plot, Table, number, percent
from server.report.lab import Lab
from server.report.not_possible import NotPossible
from server.report.sections.base import Numbers
from server.report.sections.depth import depths_at

# Depths 25, 22 and 20 of 30 layers.
_SHARES = (0.17, 0.27, 0.34)
_KINDS = {
    "plain": "skipped",
    "closed_form": "closed form",
    "healed": "healed",
}


class Healing:
    name = "healing"
    title = "Healing"
    measures = (
        "Maps that stand in for the skipped layers, in closed form, and trained further to give "
        "the dense model's next tokens (table 6 heals by other means). In the order of Block "
        "Influence, on held-out text that the training never saw; measured with transformers, on "
        "all tokens but the first of each window."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        steps = lab.options.heal_steps
        if steps == 0:
            raise NotPossible("no training was asked for; --heal-steps NUMBER does")
        lab.check_elastic()
        numbers["steps"], numbers["depths"] = steps, []
        settings = lab.settings.model_copy(
            update={
                "heal_steps": steps,
                "heal_kind": "maps",
                "heal_intermediate_size": None,
                "state_dir": lab.directory.measurements,
            }
        )
        healing: OfflineHealing | None = None
        order = (await lab.ranking(BLOCK_INFLUENCE)).removal_order
        for depth in depths_at(lab.num_layers, _SHARES):
            skipped = tuple(sorted(order[: lab.num_layers - depth]))

            async def heal(depth: int = depth, skipped: tuple[int, ...] = skipped) -> HealingReport:
                nonlocal healing
                await lab.repair()  # what the training begins with
                healing = healing or OfflineHealing(settings, lab.progress)
                name = f"Healing depth {depth}"
                report, _ = healing.heal(
                    skipped, lambda step: lab.progress.advance(name, step.step, step.num_steps)
                )
                return report

            key = {
                **lab.held_out_key,
                **lab.text_key,
                "quality_tokens": lab.settings.quality_tokens,
                "skipped": list(skipped),
                "steps": steps,
                "seed": settings.heal_seed,
            }
            measured = await lab.kept("healing-report", HealingReport, key, heal)
            row: dict[str, Any] = {"depth": depth, "dense": measured.dense.perplexity}
            for kind in _KINDS:
                quality = getattr(measured, kind)
                if quality is not None:
                    row[kind] = {
                        "perplexity": quality.perplexity,
                        "kl_nats": quality.kl_nats,
                        "agreement": quality.agreement,
                    }
            numbers["depths"].append(row)

    def render(self, numbers: Numbers) -> list[Block]:
        rows = numbers.get("depths")
        if not rows:
            return []

        def draw(figure: Any, axes: Any) -> None:
            width = 0.8 / len(_KINDS)
            for place, (kind, label) in enumerate(_KINDS.items()):
                axes.bar(
                    [x + place * width for x in range(len(rows))],
                    [row[kind]["kl_nats"] if kind in row else 0 for row in rows],
                    width,
                    label=label,
                )
            middle = width * (len(_KINDS) - 1) / 2
            axes.set_xticks(
                [x + middle for x in range(len(rows))], [str(row["depth"]) for row in rows]
            )
            axes.set_xlabel("depth")
            axes.set_ylabel("KL from the dense model, nats")
            axes.grid(axis="x", visible=False)
            axes.legend()

        return [
            Plot("healing", "Divergence with nothing, closed-form and healed maps", draw),
            Table(
                ("Depth", "In place of layers", "Perplexity", "Of dense", "KL, nats", "Agreement"),
                [
                    (
                        str(row["depth"]),
                        label,
                        number(row[kind]["perplexity"], 4),
                        number(row[kind]["perplexity"] / row["dense"]),
                        number(row[kind]["kl_nats"]),
                        percent(row[kind]["agreement"]),
                    )
                    for row in rows
                    for kind, label in _KINDS.items()
                    if kind in row
                ],
                f"{numbers['steps']} steps for each depth; dense: perplexity "
                f"{number(rows[0]['dense'], 4)}",
            ),
        ]
