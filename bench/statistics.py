"""Summaries of measured values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of one quantity, in its own unit, linearly interpolated."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Return the percentiles of ``values``, None if there are none."""
        if not values:
            return None
        p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
        return cls(p50, p95, p99)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def paired_ratio(values: Sequence[float], to: Sequence[float]) -> Spread:
    """Return the spread of ``values[i] / to[i]``.

    Values of the same index were measured right after each other, so the ratio does not depend on
    how fast the machine was in that round. Raises :class:`ValueError` for different numbers of
    values, and for none.
    """
    return Spread.of([value / other for value, other in zip(values, to, strict=True)])


def paired_difference(values: Sequence[float], to: Sequence[float]) -> Spread:
    """Return the spread of ``values[i] - to[i]``; see :func:`paired_ratio`."""
    return Spread.of([value - other for value, other in zip(values, to, strict=True)])
