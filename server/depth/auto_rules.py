"""Rules of automatic depth: its levels, target latencies and limits of quality."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from server.depth.depth_choice import RequestKind
from server.depth.depth_controller import Targets
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class AutoRules:
    """Target latencies, in seconds, and limits of quality.

    ``max_quality_loss`` is the largest perplexity divided by that of the dense model, minus 1.
    ``min_agreement`` is the smallest share of positions at which the most likely next token is
    that of the dense model.

    The limits of the probes (:mod:`pruning.probes`) are each for one kind of request. For those
    that generate: ``max_writing_loss`` is the largest perplexity of what a level writes, divided
    by that of what the dense model writes, minus 1, infinite: off; ``max_repetition`` is the
    largest share of repeated 4-grams above the dense model's own, 1: off. For those that score:
    ``max_choosing_loss`` is the largest accuracy of the dense model minus that of the level, 1:
    off. Where it is on, it stands in for ``max_quality_loss``, because perplexity does not tell
    how a level chooses.
    """

    # The levels from no load to the highest load. Empty: the policy's level without load, and all
    # that run fewer layers for generated tokens.
    levels: tuple[str, ...] = ()
    # Whether requests that name no depth leave the depth to the server.
    by_default: bool = False
    time_to_first_token: float = 1.0
    inter_token_latency: float = 0.1
    max_quality_loss: float = 0.25
    min_agreement: float = 0.0
    max_writing_loss: float = math.inf
    max_repetition: float = 1.0
    max_choosing_loss: float = 1.0
    hold_seconds: float = 30.0

    @property
    def targets(self) -> Targets:
        return Targets(self.time_to_first_token, self.inter_token_latency)


def check_rules(policy: DepthPolicy, rules: AutoRules, field: str) -> None:
    """Raise an error unless every level of the rules exists and is named once.

    That is :class:`server.errors.UnknownLevel` for a level that does not exist, and
    :class:`InvalidArgument`, naming ``field``, for a level that is named twice.
    """
    for i, name in enumerate(rules.levels):
        policy.level(name)
        if name in rules.levels[:i]:
            raise InvalidArgument(field, list(rules.levels), "each level once")


def ladder(
    policy: DepthPolicy, rules: AutoRules, kind: RequestKind = RequestKind.GENERATE
) -> tuple[Level, ...]:
    """Return the levels that ``Auto`` may get, from no load to the highest load.

    The first is the operator's own choice, whatever its quality. The others must have been measured
    and be good enough for that kind of request.
    """
    return common_ladder(policy, rules, [kind])


def common_ladder(
    policy: DepthPolicy, rules: AutoRules, kinds: Collection[RequestKind]
) -> tuple[Level, ...]:
    """Return the levels that requests of any of these kinds may get, in the order of the load."""
    first, *others = _all_levels(policy, rules)
    return first, *(
        level
        for level in others
        if any(is_good_enough(policy, level, rules, kind) for kind in kinds)
    )


def nearest(policy: DepthPolicy, rules: AutoRules, level: Level, among: Collection[Level]) -> Level:
    """Return the shallowest level of ``among`` that is ``level`` or comes before it.

    ``among`` must have the level without load.
    """
    levels = _all_levels(policy, rules)
    last = levels.index(level) if level in levels else 0
    return next(each for each in reversed(levels[: last + 1]) if each in among)


def is_good_enough(policy: DepthPolicy, level: Level, rules: AutoRules, kind: RequestKind) -> bool:
    """Return whether what was measured of the level is within the limits for that kind of request.

    What was not measured is within a limit only where the limit is off.
    """
    if level.depths == policy.dense:
        return True
    if kind is RequestKind.GENERATE:
        return (
            _keeps_perplexity(policy, level, rules)
            and _keeps_agreement(policy, level, rules)
            and _keeps_writing(policy, level, rules)
        )
    if rules.max_choosing_loss < 1:
        keeps = _keeps_choosing(policy, level, rules)
    else:
        keeps = _keeps_perplexity(policy, level, rules)
    return keeps and _keeps_agreement(policy, level, rules)


def _all_levels(policy: DepthPolicy, rules: AutoRules) -> list[Level]:
    """Return the levels in the order of the load, whatever their quality."""
    first = policy.level(policy.auto_level)
    if rules.levels:
        by_name = {level.name: level for level in policy.levels}
        others = [by_name[name] for name in rules.levels if name in by_name]
    else:
        others = [
            level
            for level in policy.levels
            if level.decode_layers < first.decode_layers
            and level.prefill_layers <= first.prefill_layers
        ]
        others.sort(key=lambda level: speedup(policy, level))
    return [first, *(level for level in others if level.depths != first.depths)]


def _keeps_perplexity(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    quality, dense = policy.qualities.get(level.depths), policy.qualities.get(policy.dense)
    if quality is None or dense is None:
        return False
    return quality.perplexity / dense.perplexity - 1 <= rules.max_quality_loss


def _keeps_agreement(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    quality = policy.qualities.get(level.depths)
    # An agreement that was not measured passes only a limit of 0.
    agreement = None if quality is None else quality.agreement
    return (0.0 if agreement is None else agreement) >= rules.min_agreement


def _keeps_writing(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    probes = policy.probes.get(level.depths)
    writing = None if probes is None else probes.writing
    loss, repetition = math.inf, 1.0
    if writing is not None and writing.ratio is not None:
        loss = writing.ratio - 1
    if writing is not None and writing.dense_repeated_share is not None:
        repetition = writing.repeated_share - writing.dense_repeated_share
    return loss <= rules.max_writing_loss and repetition <= rules.max_repetition


def _keeps_choosing(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    probes, dense = policy.probes.get(level.depths), policy.probes.get(policy.dense)
    choosing = None if probes is None else probes.choosing
    reference = None if dense is None else dense.choosing
    if choosing is None or reference is None:
        return False
    return reference.accuracy - choosing.accuracy <= rules.max_choosing_loss


def speedup(policy: DepthPolicy, level: Level) -> float:
    """Return how much faster than dense a level is: as measured, else by its number of layers."""
    speed = policy.speeds.get(level.depths)
    measured = None if speed is None else speed.speedup
    return policy.num_layers / level.decode_layers if measured is None else measured
