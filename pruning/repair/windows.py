"""Which text a map is fitted on, and which its ridge is chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pruning.repair.errors import RepairError

# One text window in so many is held out.
_HELD_OUT_EVERY = 8

W = TypeVar("W")


def split_windows(windows: Sequence[W]) -> tuple[list[W], list[W]]:
    """Return the windows to fit on and those that are held out: one in eight, at least one.

    Raises :class:`RepairError` for fewer than two windows.
    """
    if len(windows) < 2:
        raise RepairError(
            f"text: got {len(windows)} text windows, allowed: 2 or more, one of them held out"
        )
    every = min(_HELD_OUT_EVERY, len(windows))
    held_out = [window for number, window in enumerate(windows, 1) if number % every == 0]
    fit = [window for number, window in enumerate(windows, 1) if number % every != 0]
    return fit, held_out
