"""Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the correlation of the ranks of ``x`` and ``y``, -1 to 1.

    Equal values share the mean of their ranks. None where there are fewer than two values, or
    where all values of a side are equal, which have no order.
    """
    if len(x) != len(y):
        raise ValueError(f"y: got {len(y)} values, allowed: {len(x)}, as many as x has")
    if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    means: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return means
