"""The limit of a depth's speed.

If a step at full depth L spends the share s of its time in decoder layers, depth d cannot run
more than 1 / (1 - s + s d/L) times as fast. This is Amdahl's law, with the skipped layers as the
part that is sped up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds that a load takes as a function of depth: ``fixed + per_layer * depth``."""

    fixed: float
    per_layer: float

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> StepTime | None:
        """Return the least-squares line through seconds by depth; None for fewer than two depths.

        Errors are weighted by 1 / seconds, because relative errors count.
        """
        if len(seconds) < 2:
            return None
        depths = np.array(list(seconds), float)
        times = np.array(list(seconds.values()), float)
        per_layer, fixed = np.polyfit(depths, times, 1, w=1 / times).tolist()
        return cls(fixed, per_layer)

    def layer_share(self, num_layers: int) -> float:
        """Return the share of the time at full depth that the layers take, within [0, 1]."""
        layers = self.per_layer * num_layers
        total = self.fixed + layers
        return min(1.0, max(0.0, layers / total)) if total > 0 else 1.0


def best_speedup(layer_share: float, depth: int, num_layers: int) -> float:
    """Return the limit of depth ``depth``, relative to full depth."""
    return 1 / (1 - layer_share + layer_share * depth / num_layers)


def limits(seconds: Mapping[int, float], num_layers: int) -> dict[int, float | None]:
    """Return the best possible speedup of each depth, from the seconds of the other depths.

    The limit of a depth comes from a line through the other depths. A line through all of them
    would bend towards the depth itself, and hide what it lacks. Full depth always stays in, because
    speedups are relative to it. The limit is None if fewer than two depths are left.
    """
    result: dict[int, float | None] = {}
    for depth in seconds:
        others = {d: s for d, s in seconds.items() if d != depth or d == num_layers}
        line = StepTime.fit(others)
        result[depth] = (
            None
            if line is None or num_layers not in others
            else best_speedup(line.layer_share(num_layers), depth, num_layers)
        )
    return result
