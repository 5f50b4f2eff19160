"""Sliding means over the last seconds."""

from __future__ import annotations

from collections import deque

# Measurements of this span are summed up, so that many cost no more memory than few.
_GRAIN_SECONDS = 0.25


class LatencyWindow:
    """Count and mean of the measurements of the last ``seconds``; times are given by the caller."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # (start of the grain, sum, count)
        self._grains: deque[list[float]] = deque()
        self._sum = 0.0
        self._count = 0.0

    def add(self, now: float, value: float, count: int = 1) -> None:
        """Add ``count`` measurements whose sum is ``value``."""
        grain = now - now % _GRAIN_SECONDS
        if self._grains and self._grains[-1][0] == grain:
            self._grains[-1][1] += value
            self._grains[-1][2] += count
        else:
            self._grains.append([grain, value, float(count)])
        self._sum += value
        self._count += count
        self._forget(now)

    def count(self, now: float) -> float:
        """Return the number of measurements."""
        self._forget(now)
        return self._count

    def mean(self, now: float) -> float:
        """Return the mean; 0.0 without measurements."""
        self._forget(now)
        return self._sum / self._count if self._count else 0.0

    def _forget(self, now: float) -> None:
        while self._grains and self._grains[0][0] <= now - self._seconds:
            _, value, count = self._grains.popleft()
            self._sum -= value
            self._count -= count
        if not self._grains:
            self._sum = self._count = 0.0  # rounding may have left a rest
