"""Rules of automatic depth: its levels, target latencies and limits of quality."""

from __future__ import annotations

from dataclasses import dataclass

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


def ladder(policy: DepthPolicy, rules: AutoRules) -> tuple[Level, ...]:
    """Return the levels that ``Auto`` may get, from no load to the highest load.

    The first is the operator's own choice, whatever its quality. The others must have been measured
    and be good enough.
    """
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
    others = [level for level in others if level.depths != first.depths]
    return first, *(level for level in others if is_good_enough(policy, level, rules))


def is_good_enough(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    """Return whether the level's measured quality is within the limits of the rules."""
    if level.depths == policy.dense:
        return True
    quality, dense = policy.qualities.get(level.depths), policy.qualities.get(policy.dense)
    if quality is None or dense is None:
        return False
    loss = quality.perplexity / dense.perplexity - 1
    # An agreement that was not measured passes only a limit of 0.
    agreement = 0.0 if quality.agreement is None else quality.agreement
    return loss <= rules.max_quality_loss and agreement >= rules.min_agreement


def speedup(policy: DepthPolicy, level: Level) -> float:
    """Return how much faster than dense a level is: as measured, else by its number of layers."""
    speed = policy.speeds.get(level.depths)
    measured = None if speed is None else speed.speedup
    return policy.num_layers / level.decode_layers if measured is None else measured
