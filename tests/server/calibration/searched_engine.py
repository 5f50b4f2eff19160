"""A toy engine in which layers that are left out together cost more than each alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pruning.metrics import Selection
from pruning.quality import Quality
from server.engine.base import LayerSelection, ProgressCallback
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine

# Layers 5 and 2 do the same, so that one of them has to stay.
WEIGHTS = (9.0, 3.0, 1.0, 4.0, 2.0, 1.1, 5.0, 8.0)
REDUNDANT = {2, 5}
assert len(WEIGHTS) == NUM_LAYERS


def kl_without(skipped: Selection) -> float:
    together = 50.0 if set(skipped) >= REDUNDANT else 0.0
    return math.pow(sum(WEIGHTS[layer] for layer in skipped) + together, 1.5) / 100


def greedy_order(num_removed: int) -> list[int]:
    """Return what greedy removal finds that looks at every layer each time."""
    order: list[int] = []
    for _ in range(num_removed):
        left = [layer for layer in range(NUM_LAYERS) if layer not in order]
        order.append(min(left, key=lambda layer: kl_without(tuple(sorted([*order, layer])))))
    return order


class SearchedEngine(ToyEngine):
    """Records what is measured, and dies before its ``num_lives``-th measurement."""

    def __init__(self, num_lives: int | None = None) -> None:
        super().__init__()
        self.calls: list[list[LayerSelection]] = []
        self.num_tokens_run = 0
        self.num_lives = num_lives

    @property
    def measured(self) -> list[LayerSelection]:
        return [layers for call in self.calls for layers in call]

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        if self.num_lives is not None:
            self.num_lives -= 1
            if self.num_lives == 0:
                self.die()
        qualities = await super().measure_quality(windows, selections, progress)
        self.calls.append(list(selections))
        self.num_tokens_run += (len(selections) + 1) * sum(map(len, windows))
        return [
            replace(quality, kl_nats=kl_without(layers.decode_skips))
            for layers, quality in zip(selections, qualities, strict=True)
        ]
