"""The time that a report may take."""

from __future__ import annotations

import math
import time


class BudgetSpent(Exception):
    """There is no time left for another measurement."""


class Budget:
    """Seconds from now on; a measurement that has begun is brought to its end."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left; not below 0."""
        return max(self._end - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise :class:`BudgetSpent` where no time is left."""
        if self.remaining <= 0:
            raise BudgetSpent
