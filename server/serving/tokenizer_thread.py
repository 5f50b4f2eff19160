"""A thread that tokenizes, shared fairly among clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.serving.fair_queue import Claim, FairQueue

T = TypeVar("T")


class TokenizerThread:
    """Runs one piece of work at a time; the others wait in ``queue``, shared fairly."""

    def __init__(self, name: str) -> None:
        self.queue = FairQueue(1)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, claim: Claim, function: Callable[[], T], cost: float) -> T:
        """Run ``function`` when it is the client's turn; return its result.

        ``cost`` is charged to the client. Raises the errors of :meth:`FairQueue.enter`.
        """
        async with self.queue.slot(
            claim.client, cost=cost, deadline=claim.deadline, on_refused=claim.on_refused
        ):
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
