"""The depths of levels that are given by what they may lose: which to measure, and which it is.

A depth is good enough for a level if its perplexity divided by that of the dense model, and one
standard error more, is at most 1 + ``max_quality_loss``: a level is not chosen for its luck with
the text. The error is that of the ratio; both depths see the same windows of text, so it is far
smaller than that of either perplexity. Where it has not been measured, the ratio alone counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pruning.quality import Quality
from server.depth.levels import DepthPair, Level, LevelSpec
from server.depth.policy import DepthPolicy

# So many next shallower depths than the one that was found are looked at, too.
REACH = 2

_STANDARD_ERRORS = 1.0
# Of all layers; what stands in, in comparisons, for depths that have not been found yet.
_SHARES = 0.9, 0.8, 0.65


class _Unmeasured(Exception):
    """A depth must be measured before the search can go on."""

    def __init__(self, depths: DepthPair) -> None:
        super().__init__(depths)
        self.depths = depths


def shallowest_depth(num_layers: int, is_good: Callable[[int], bool]) -> int:
    """Return the shallowest depth that is good enough, as far as bisection can tell.

    Quality need not fall with every layer that is left out. What holds in any case: the depth is
    good enough, or it is all ``num_layers``, which is not asked about; and none of the
    ``REACH`` next shallower depths is. Where every depth below one that is not good enough is not
    good enough either, it is the shallowest of all. Asks about at most
    log2(``num_layers``) + 1 depths, and ``REACH`` more for each step beyond.
    """
    not_good, good = 0, num_layers
    while good - not_good > 1:
        middle = (not_good + good) // 2
        if is_good(middle):
            good = middle
        else:
            not_good = middle
    while (shallower := _good_within_reach(good, is_good)) is not None:
        good = shallower
    return good


def _good_within_reach(depth: int, is_good: Callable[[int], bool]) -> int | None:
    shallower = range(depth - 1, max(depth - 1 - REACH, 0), -1)
    return next(filter(is_good, shallower), None)


def is_within(quality: Quality, dense: Quality, max_quality_loss: float) -> bool:
    """Return whether a depth of this quality is good enough for a level."""
    if not quality.perplexity < math.inf:
        return False
    log_ratio = math.log(quality.perplexity / dense.perplexity)
    stderr = quality.log_ratio_stderr or 0.0
    return log_ratio + _STANDARD_ERRORS * stderr <= math.log1p(max_quality_loss)


@dataclass(slots=True)
class LevelSearch:
    """What the measurements of a policy say about the levels that it was asked for."""

    # As far as they are known. One that is pending has all layers, or does not exist if it is
    # optional.
    levels: list[Level] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    # What must be measured next for the pending ones. Optional levels of the prompt can wait.
    missing: list[DepthPair] = field(default_factory=list)
    missing_that_can_wait: list[DepthPair] = field(default_factory=list)
    # The levels for which only the dense model is good enough.
    unmet: list[Level] = field(default_factory=list)


def search_levels(policy: DepthPolicy) -> LevelSearch:
    """Return the levels as far as they are known, and what must be measured to know more.

    The same measurements always give the same levels, in whichever order they were made.
    """
    num_layers = policy.num_layers
    search = LevelSearch()
    for spec in policy.specs:
        if not spec.is_searched:
            search.levels.append(spec.resolve(num_layers))
            continue
        try:
            depth = shallowest_depth(num_layers, _judge(policy, spec))
        except _Unmeasured as unmeasured:
            can_wait = spec.optional and spec.prompt_only
            (search.missing_that_can_wait if can_wait else search.missing).append(unmeasured.depths)
            search.pending.append(spec.name)
            depth = num_layers
        else:
            if depth == num_layers and not spec.optional:
                search.unmet.append(spec.at(depth, num_layers))
        level = spec.at(depth, num_layers)
        if not spec.optional or _is_another(level, policy, search):
            search.levels.append(level)
    return search


def with_found_levels(policy: DepthPolicy) -> DepthPolicy:
    """Return the policy with the levels that its measurements give."""
    levels = tuple(search_levels(policy).levels)
    return policy if levels == policy.levels else policy.with_found(levels)


def compared_depths(specs: Collection[LevelSpec], num_layers: int) -> list[DepthPair]:
    """Return the pruned depths at which orders of layers, or repair and none, are compared.

    They are those of the levels, as far as they are given, and in place of those that are to be
    searched for some that they may have.
    """
    given = [spec.resolve(num_layers).depths for spec in specs if not spec.is_searched]
    if any(spec.is_searched for spec in specs):
        depths = [max(int(num_layers * share), 1) for share in _SHARES]
        given += [DepthPair(depth, depth) for depth in depths]
    dense = DepthPair(num_layers, num_layers)
    return [pair for pair in dict.fromkeys(given) if pair != dense]


def problem_of(level: Level) -> str:
    """Return what is to be said about a level for which only the dense model is good enough."""
    assert level.max_quality_loss is not None
    return (
        f"level {level.name}: no depth was found that loses at most "
        f"{level.max_quality_loss:g} in perplexity, so it runs all {level.decode_layers} layers"
    )


def _is_another(level: Level, policy: DepthPolicy, search: LevelSearch) -> bool:
    """Return whether an optional level is worth having beside those before it.

    That is not known while one of those is pending: it may turn out to be the same.
    """
    pending = set(search.pending)
    if level.name in pending or level.depths == policy.dense:
        return False
    is_prompt = level.prefill_layers != level.decode_layers
    return (is_prompt or not pending) and level.depths not in {x.depths for x in search.levels}


def _judge(policy: DepthPolicy, spec: LevelSpec) -> Callable[[int], bool]:
    """Return what says whether a depth is good enough; it raises where it does not know."""
    assert spec.max_quality_loss is not None
    max_quality_loss = spec.max_quality_loss

    def is_good(depth: int) -> bool:
        depths = spec.at(depth, policy.num_layers).depths
        dense, quality = (policy.qualities.get(pair) for pair in (policy.dense, depths))
        if dense is None or quality is None:
            raise _Unmeasured(depths)
        return is_within(quality, dense, max_quality_loss)

    return is_good
