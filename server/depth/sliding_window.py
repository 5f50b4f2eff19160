"""Sliding windows over the latest measurements; times are in seconds of a clock."""

from __future__ import annotations

import math
from collections import deque


class SlidingWindow:
    """Sum and number of the latest measurements.

    Measurements are kept in grains: those of one grain are forgotten at once, so that many of
    them cost no more than few.
    """

    def __init__(
        self, seconds: float = math.inf, *, grain: float = 0.25, max_grains: int | None = None
    ) -> None:
        """Forget what is older than ``seconds``, and the oldest of more than ``max_grains``.

        ``grain`` is in seconds; 0: each measurement is a grain.
        """
        self._seconds = seconds
        self._grain = grain
        self._max_grains = max_grains
        # (start of the grain, sum, count), oldest first.
        self._grains: deque[list[float]] = deque()
        self._sum = 0.0
        self._count = 0.0

    def add(self, now: float, value: float = 0.0, count: int = 1) -> None:
        """Count ``value``, the sum of ``count`` measurements."""
        start = now - now % self._grain if self._grain else now
        if self._grain and self._grains and self._grains[-1][0] == start:
            self._grains[-1][1] += value
            self._grains[-1][2] += count
        else:
            self._grains.append([start, value, float(count)])
        self._sum += value
        self._count += count
        self._forget(now)

    def clear(self) -> None:
        """Forget everything."""
        self._grains.clear()
        self._sum = self._count = 0.0

    def sum(self, now: float) -> float:
        """Return the sum of what was measured."""
        self._forget(now)
        return self._sum

    def count(self, now: float) -> float:
        """Return how many measurements there were."""
        self._forget(now)
        return self._count

    def mean(self, now: float) -> float:
        """Return the mean; 0.0 where nothing was measured."""
        self._forget(now)
        return self._sum / self._count if self._count else 0.0

    def interval(self, num_needed: int) -> float:
        """Return the mean time from one grain to the next; 0.0 for fewer than ``num_needed``."""
        num_intervals = len(self._grains) - 1
        if num_intervals < max(1, num_needed):
            return 0.0
        return (self._grains[-1][0] - self._grains[0][0]) / num_intervals

    def _forget(self, now: float) -> None:
        while self._grains and (
            self._grains[0][0] <= now - self._seconds
            or (self._max_grains is not None and len(self._grains) > self._max_grains)
        ):
            _, value, count = self._grains.popleft()
            self._sum -= value
            self._count -= count
        if not self._grains:
            self._sum = self._count = 0.0  # else errors of rounding would stay
