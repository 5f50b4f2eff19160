"""Depth arithmetic: how many layers run, and which of them are left out.

With ``num_layers`` L, a depth is the number of layers that run, 1..L, and the prune ratio of a
depth is the share of layers left out. A removal order names all L layers, least important
first; depth d leaves out the first L - d of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

# In layers. Ratios that were written as decimals or computed as ``1 - depth / num_layers`` miss
# the whole number of layers that was meant by far less than this.
_ROUNDING = 1e-9


def check_depth(num_layers: int, depth: int) -> None:
    """Raise :class:`ValueError` unless ``depth`` is in 1..``num_layers``."""
    _check_num_layers(num_layers)
    if not 1 <= depth <= num_layers:
        raise ValueError(f"depth: got {depth}, allowed: 1 to {num_layers}")


def depth_of_prune_ratio(num_layers: int, prune_ratio: float) -> int:
    """Return the depth that leaves out at most the share ``prune_ratio`` of the layers.

    The number of layers left out is rounded down, so that a model is never pruned more than was
    asked for, and at least one layer runs. Raises :class:`ValueError` unless
    0 <= ``prune_ratio`` < 1.
    """
    _check_num_layers(num_layers)
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio: got {prune_ratio}, allowed: at least 0 and less than 1")
    num_removed = math.floor(num_layers * prune_ratio + _ROUNDING)
    return max(num_layers - num_removed, 1)


def prune_ratio_of_depth(num_layers: int, depth: int) -> float:
    """Return the share of the layers that ``depth`` leaves out."""
    check_depth(num_layers, depth)
    return (num_layers - depth) / num_layers


def removal_order(scores: Sequence[float]) -> tuple[int, ...]:
    """Return the layers by ascending score: the least important first.

    Of layers with equal scores the deeper one goes first: fewer layers then work on a state
    that lacks its contribution. Raises :class:`ValueError` for a NaN, which has no place in an
    order, and for no scores at all.
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
    """Return the layers that ``depth`` leaves out, in ascending order."""
    check_depth(len(removal_order), depth)
    return tuple(sorted(removal_order[: len(removal_order) - depth]))


def _check_num_layers(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers: got {num_layers}, allowed: at least 1")
