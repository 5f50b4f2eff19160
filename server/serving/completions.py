"""Several completions of one prompt: each is a request of its own."""

from __future__ import annotations

# The most completions of one prompt.
MAX_COMPLETIONS = 128

_NUM_SEEDS = 2**63


def seed_of(seed: int | None, index: int) -> int | None:
    """Return the seed of completion ``index``, counted from 0; None: none was given."""
    return None if seed is None else (seed + index) % _NUM_SEEDS
