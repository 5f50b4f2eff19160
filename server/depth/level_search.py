"""The depths of levels that are given by what they may lose: which to measure, and which it is.

A depth is good enough for a level if what it loses, and one standard error more, is within each
limit of the level: a level is not chosen for its luck with the text. For ``max_quality_loss``
that is perplexity divided by that of the dense model. Both depths see the same windows of text, so
the error of the ratio is far smaller than that of either perplexity. Where it has not been
measured, the ratio alone counts. For ``max_writing_loss`` and ``max_choosing_loss`` it is what the
probes have found, which are small, so their errors are large. Where there is too little text for a
probe, only the dense model is good enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pruning.probes import Probes
from pruning.quality import Quality
from server.depth.levels import DepthPair, Level, LevelSpec, Limit
from server.depth.policy import DepthPolicy

# So many next shallower depths than the one that was found are looked at, too.
REACH = 2

_STANDARD_ERRORS = 1.0
_LOST_IN = {
    Limit.QUALITY: "perplexity",
    Limit.WRITING: "writing",
    Limit.CHOOSING: "choosing",
}
# Of all layers; what stands in, in comparisons, for depths that have not been found yet.
_SHARES = 0.9, 0.8, 0.65


class _Unmeasured(Exception):
    """A depth must be measured before the search can go on, or probed."""

    def __init__(self, depths: DepthPair, *, is_probe: bool) -> None:
        super().__init__(depths)
        self.depths = depths
        self.is_probe = is_probe


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


def writes_within(probes: Probes, max_writing_loss: float) -> bool:
    """Return whether a depth writes well enough for a level."""
    loss = None if probes.writing is None else probes.writing.loss
    if loss is None:
        return False
    lost, stderr = loss
    return lost + _STANDARD_ERRORS * stderr <= math.log1p(max_writing_loss)


def chooses_within(probes: Probes, dense: Probes, max_choosing_loss: float) -> bool:
    """Return whether a depth chooses well enough for a level."""
    if probes.choosing is None or dense.choosing is None:
        return False
    lost, stderr = probes.choosing.loss(dense.choosing)
    return lost + _STANDARD_ERRORS * stderr <= max_choosing_loss


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
    # The same of what must be probed.
    missing_probes: list[DepthPair] = field(default_factory=list)
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
            if unmeasured.is_probe:
                search.missing_probes.append(unmeasured.depths)
            elif can_wait:
                search.missing_that_can_wait.append(unmeasured.depths)
            else:
                search.missing.append(unmeasured.depths)
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
    losses = " and ".join(f"{limit:g} in {_LOST_IN[kind]}" for kind, limit in level.limits.items())
    return (
        f"level {level.name}: no depth was found that loses at most {losses}, so it runs all "
        f"{level.decode_layers} layers"
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
    limits = spec.limits

    def keeps(kind: Limit, limit: float, depths: DepthPair) -> bool:
        if kind is Limit.QUALITY:
            dense, quality = (policy.qualities.get(pair) for pair in (policy.dense, depths))
            if dense is None or quality is None:
                raise _Unmeasured(depths, is_probe=False)
            return is_within(quality, dense, limit)
        dense_probes, probes = (policy.probes.get(pair) for pair in (policy.dense, depths))
        if probes is None or not policy.is_probed(depths):
            raise _Unmeasured(depths, is_probe=True)
        if kind is Limit.WRITING:
            return writes_within(probes, limit)
        if dense_probes is None:
            raise _Unmeasured(policy.dense, is_probe=True)
        return chooses_within(probes, dense_probes, limit)

    def is_good(depth: int) -> bool:
        depths = spec.at(depth, policy.num_layers).depths
        # Perplexity comes first: where it is too high, nothing has to be probed.
        return all(keeps(kind, limit, depths) for kind, limit in limits.items())

    return is_good
