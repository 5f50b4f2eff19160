"""What an operator allows the server to choose for requests that leave the depth to it."""

from __future__ import annotations

from dataclasses import dataclass

from server.depth.depth_controller import Targets
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class AutoRules:
    """Latencies to keep, in seconds, and what quality may be given up for them.

    ``max_quality_loss`` is the largest perplexity ratio to dense, less 1; ``min_agreement`` the
    smallest share of next tokens that are the dense model's.
    """

    # The first without load, each further one under more. Empty: the level of the policy, and all
    # that are shallower.
    levels: tuple[str, ...] = ()
    # Whether requests that name no depth leave it to the server.
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
    """Raise :class:`InvalidArgument` for a level that is named twice, and
    :class:`server.errors.UnknownLevel` for one that does not exist.
    """
    for i, name in enumerate(rules.levels):
        policy.level(name)
        if name in rules.levels[:i]:
            raise InvalidArgument(field, list(rules.levels), "each level once")


def ladder(policy: DepthPolicy, rules: AutoRules) -> tuple[Level, ...]:
    """Return the levels that ``Auto`` may get, the one without load first.

    That one is the operator's own choice; of the others, those stay out whose quality is below
    the floor or has not been measured.
    """
    first = policy.level(policy.auto_level)
    if rules.levels:
        by_name = {level.name: level for level in policy.levels}
        others = [by_name[name] for name in rules.levels if name in by_name]
    else:
        others = [
            level
            for level in policy.levels
            if level.decode_layers <= first.decode_layers
            and level.prefill_layers <= first.prefill_layers
        ]
        others.sort(key=lambda level: speedup(policy, level))
    others = [level for level in others if level.depths != first.depths]
    return first, *(level for level in others if is_good_enough(policy, level, rules))


def is_good_enough(policy: DepthPolicy, level: Level, rules: AutoRules) -> bool:
    """Return whether the level's measured quality is above the floor."""
    if level.depths == policy.dense:
        return True
    quality, dense = policy.qualities.get(level.depths), policy.qualities.get(policy.dense)
    if quality is None or dense is None:
        return False
    loss = quality.perplexity / dense.perplexity - 1
    # Where it was not measured, it is above no floor but the lowest.
    agreement = 0.0 if quality.agreement is None else quality.agreement
    return loss <= rules.max_quality_loss and agreement >= rules.min_agreement


def speedup(policy: DepthPolicy, level: Level) -> float:
    """Return how much faster than dense a level is: as measured, else by its layers."""
    speed = policy.speeds.get(level.depths)
    measured = None if speed is None else speed.speedup
    return policy.num_layers / level.decode_layers if measured is None else measured
