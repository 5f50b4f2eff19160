"""Tasks that run at once, and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run ``works`` at once and return what they return, in their order.

    The first error cancels the others, and is raised when all have ended. Cancelling this cancels
    all. Each is cancelled once, so that what it does to clean up is not interrupted.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    # Outside of the handler, so that its own cause is what is shown with it, and nothing else.
    raise failure
