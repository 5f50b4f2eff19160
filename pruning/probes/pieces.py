"""Pieces of held-out text, which the probes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ProbeTextError(ValueError):
    """Text that is too little for a probe."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that follow each other in the window of that number."""

    window: int
    token_ids: tuple[int, ...]


def pieces(
    windows: Sequence[Sequence[int]], length: int, *, at_least: int, at_most: int
) -> list[Piece]:
    """Return pieces of ``length`` tokens each, which do not overlap.

    Takes the first piece of each window, then the second of each, and so on, so that as many
    documents as possible are among the first ``at_most``. Raises :class:`ProbeTextError`, which
    says how much text is needed, for fewer than ``at_least``.
    """
    longest = max(map(len, windows), default=0)
    found = [
        Piece(number, tuple(window[start : start + length]))
        for start in range(0, longest - length + 1, length)
        for number, window in enumerate(windows)
        if start + length <= len(window)
    ]
    if len(found) < at_least:
        raise ProbeTextError(
            f"the held-out text has {sum(map(len, windows))} tokens in {len(windows)} windows, "
            f"which give {len(found)} pieces of {length} tokens, allowed: {at_least} or more, "
            f"which takes {at_least * length} tokens or more"
        )
    return found[:at_most]
