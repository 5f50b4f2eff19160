"""The levels that a server of this model would have, found by what the report measures."""

from __future__ import annotations

from pruning.fingerprint import text_fingerprint
from pruning.plan import Plan
from server.calibration.versions import measuring_versions
from server.depth.level_search import search_levels, with_found_levels
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from server.model.inputs import chosen_levels, refused_as
from server.report.lab import Lab


async def found_policy(lab: Lab, metric: str, *, repaired: bool) -> DepthPolicy:
    """Return a policy with the levels of the settings in the order of ``metric``.

    Those that are given by what they may lose are searched for as a server does. Raises what
    :class:`Lab` does.
    """
    influence = await lab.importance()
    repair = await lab.repair() if repaired else None
    plan = Plan.from_importance(
        influence,
        model_fingerprint=lab.subject.fingerprint,
        text_fingerprint=text_fingerprint(lab.subject.texts),
        tokenizer_fingerprint=lab.subject.tokenizer,
        versions=measuring_versions(),
    )
    plan = plan.ranked_by(metric, await lab.ranking(metric, repair))
    with refused_as("levels"):
        specs, default = chosen_levels(lab.settings, lab.num_layers)
        policy = DepthPolicy(
            plan,
            tuple(spec.resolve(lab.num_layers) for spec in specs),
            default,
            specs=specs,
            repair=repair,
        )
    missing = [policy.dense]  # what the others are compared with
    while missing:
        selections = {policy.selection(pair): pair for pair in missing}
        measured = {}
        async for layers, quality in lab.qualities(list(selections), "Levels"):
            measured[selections[layers]] = quality
        policy = policy.with_measured(Measured(measured))
        search = search_levels(policy)
        missing = [*search.missing, *search.missing_that_can_wait]
    return with_found_levels(policy)
