"""Healed maps and gated MLPs against maps in closed form (table 6 of the paper)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pruning.metrics.names import BLOCK_INFLUENCE
from pruning.quality import Quality
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
    "healed": "healed maps",
    "gated_mlps": "gated MLPs",
}


class _Trainings:
    """Trainings of one kind, with the settings of a report."""

    def __init__(self, lab: Lab, kind: str) -> None:
        self._lab = lab
        self._settings = lab.settings.model_copy(
            update={
                "heal_steps": lab.options.heal_steps,
                "heal_kind": kind,
                "heal_intermediate_size": None,
                "state_dir": lab.directory.measurements,
            }
        )

    @cached_property
    def _healing(self) -> OfflineHealing:
        return OfflineHealing(self._settings, self._lab.progress)

    async def report(self, depth: int, skipped: tuple[int, ...]) -> HealingReport:
        lab, settings = self._lab, self._settings

        async def heal() -> HealingReport:
            await lab.repair()  # what maps begin with, and what MLPs are compared with
            name = f"Healing depth {depth}, {settings.heal_kind}"
            report, _ = self._healing.heal(
                skipped, lambda step: lab.progress.advance(name, step.step, step.num_steps)
            )
            return report

        key = {
            **lab.held_out_key,
            **lab.text_key,
            "quality_tokens": settings.quality_tokens,
            "skipped": list(skipped),
            "steps": settings.heal_steps,
            "seed": settings.heal_seed,
            "kind": settings.heal_kind,
        }
        return await lab.kept("healing-report", HealingReport, key, heal)


def _numbers(quality: Quality) -> dict[str, float | None]:
    return {
        "perplexity": quality.perplexity,
        "kl_nats": quality.kl_nats,
        "agreement": quality.agreement,
    }


class Healing:
    name = "healing"
    title = "Healing"
    measures = (
        "What stands in for the skipped layers: maps in closed form, maps trained further to give "
        "the dense model's next tokens, and gated MLPs with as many parameters, one for each run "
        "of skipped layers (table 6), trained in the same way on the same tokens. In the order of "
        "Block Influence, on held-out text that the training never saw; measured with "
        "transformers, on all tokens but the first of each window."
    )

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        steps = lab.options.heal_steps
        if steps == 0:
            raise NotPossible("no training was asked for; --heal-steps NUMBER does")
        lab.check_elastic()
        numbers["steps"], numbers["depths"] = steps, []
        order = (await lab.ranking(BLOCK_INFLUENCE)).removal_order
        rows: dict[int, dict[str, Any]] = {}
        for kind, name in (("maps", "healed"), ("gated-mlp", "gated_mlps")):
            trainings = _Trainings(lab, kind)
            for depth in depths_at(lab.num_layers, _SHARES):
                skipped = tuple(sorted(order[: lab.num_layers - depth]))
                measured = await trainings.report(depth, skipped)
                row = rows.setdefault(depth, {"depth": depth, "dense": measured.dense.perplexity})
                row |= {
                    "plain": _numbers(measured.plain),
                    name: _numbers(measured.healed),
                }
                if measured.closed_form is not None:
                    row["closed_form"] = _numbers(measured.closed_form)
                numbers["depths"] = list(rows.values())

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
            Plot("healing", "Divergence by what stands in for the layers", draw),
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
