"""Depth arithmetic: depths, prune ratios and removal orders.

For a model with ``num_layers`` L, a depth is the number of layers that run, 1..L. The prune ratio
of a depth d is the share of layers that are skipped, 1 - d / L. A removal order lists all L layers,
least important first; depth d skips the first L - d of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

# A ratio that was written as a decimal or computed as ``1 - depth / num_layers`` misses a whole
# number of layers by far less than this.
_ROUNDING_LAYERS = 1e-9


def check_depth(num_layers: int, depth: int) -> None:
    """Raise :class:`ValueError` unless ``depth`` is in 1..``num_layers``."""
    _check_num_layers(num_layers)
    if not 1 <= depth <= num_layers:
        raise ValueError(f"depth: got {depth}, allowed: 1 to {num_layers}")


def depth_of_prune_ratio(num_layers: int, prune_ratio: float) -> int:
    """Return the depth that skips at most the share ``prune_ratio`` of the layers.

    The number of skipped layers is rounded down, so a model is never pruned more than was asked
    for, and at least one layer runs. Raises :class:`ValueError` unless
    0 <= ``prune_ratio`` < 1.
    """
    _check_num_layers(num_layers)
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio: got {prune_ratio}, allowed: at least 0 and less than 1")
    num_removed = math.floor(num_layers * prune_ratio + _ROUNDING_LAYERS)
    return max(num_layers - num_removed, 1)


def prune_ratio_of_depth(num_layers: int, depth: int) -> float:
    """Return the share of the layers that ``depth`` skips."""
    check_depth(num_layers, depth)
    return (num_layers - depth) / num_layers


def removal_order(scores: Sequence[float]) -> tuple[int, ...]:
    """Return the layers by ascending score, so the least important is first.

    Of layers with equal scores the deeper one is first, because fewer layers come after it and
    miss its contribution. Raises :class:`ValueError` for a NaN and for an empty list.
    """
    _check_num_layers(len(scores))
    for layer, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"scores: got NaN for layer {layer}, allowed: numbers")
    return tuple(sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer)))


def check_removal_order(order: Sequence[int], num_layers: int) -> None:
    """Raise :class:`ValueError` unless ``order`` names each of ``num_layers`` layers once."""
    _check_num_layers(num_layers)
    if len(order) != num_layers:
        problem = f"{len(order)} layers"
    elif outside := [layer for layer in order if not 0 <= layer < num_layers]:
        problem = f"layer {outside[0]}"
    elif repeated := [layer for layer, count in Counter(order).items() if count > 1]:
        problem = f"layer {repeated[0]} more than once"
    else:
        return
    allowed = f"each of the layers 0 to {num_layers - 1} exactly once"
    raise ValueError(f"removal_order: got {problem}, allowed: {allowed}")


def skipped_layers(removal_order: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the layers that ``depth`` skips, in ascending order."""
    check_depth(len(removal_order), depth)
    return tuple(sorted(removal_order[: len(removal_order) - depth]))


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers: got {num_layers}, allowed: at least 1")
