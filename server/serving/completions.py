"""Several completions of one prompt: each is a request of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable

# The most completions of one prompt.
MAX_COMPLETIONS = 128

_NUM_SEEDS = 2**63


def seed_of(seed: int | None, index: int) -> int | None:
    """Return the seed of completion ``index``, counted from 0; None: none was given."""
    return None if seed is None else (seed + index) % _NUM_SEEDS


async def run_together(completions: Iterable[Coroutine[object, object, None]]) -> None:
    """Run them at once and return when all have ended.

    The first error ends the others, and is raised: an engine's death ends all of them, and one
    error says it. Cancelling this cancels all.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for completion in completions:
                group.create_task(completion)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
