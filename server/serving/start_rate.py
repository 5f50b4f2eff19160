"""How fast requests start while others wait."""

from __future__ import annotations

from collections import deque

_NUM_STARTS = 512
_NUM_NEEDED = 16
# What is to be sure of must hold even at so many times the rate that was measured.
_OPTIMISM = 2.0


class StartRate:
    """Measures the latest starts; times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=_NUM_STARTS)

    def add(self, now: float) -> None:
        """Count a start."""
        self._starts.append(now)

    def forget(self) -> None:
        """Begin anew: what follows is no part of the same rush."""
        self._starts.clear()

    def seconds_for(self, num_starts: int) -> float:
        """Return how long so many starts take at least; 0.0 where too few were measured."""
        measured = len(self._starts) - 1
        if measured < _NUM_NEEDED:
            return 0.0
        return num_starts * (self._starts[-1] - self._starts[0]) / measured / _OPTIMISM
