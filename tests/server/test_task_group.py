"""Tasks that run at once, and end together."""

from __future__ import annotations

import asyncio

import pytest

from server.task_group import run_together


class Workers:
    """Wait for each other, or for ever, and tidy up for some turns of the loop when cancelled."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.num_tidy = 0

    async def wait(self) -> None:
        self.num_waiting += 1
        number = self.num_waiting
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5 * number):
                await asyncio.sleep(0)
            self.num_tidy += 1

    async def fail(self, after: int, error: Exception) -> None:
        while self.num_waiting < after:
            await asyncio.sleep(0)
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise error from cause


async def test_results_are_in_order_whichever_ends_first() -> None:
    async def last(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert await run_together(last(turns) for turns in (3, 0, 2)) == [3, 0, 2]
    assert await run_together([]) == []


async def test_an_error_ends_the_others_and_has_its_own_cause() -> None:
    workers = Workers()
    error = LookupError("first")
    works = [workers.wait(), workers.fail(2, error), workers.wait()]
    with pytest.raises(LookupError) as raised:
        await run_together(works)
    assert raised.value is error
    assert isinstance(error.__cause__, ValueError)
    assert workers.num_tidy == 2


async def test_of_several_errors_one_is_raised() -> None:
    workers = Workers()
    first, second = LookupError("first"), OSError("second")
    with pytest.raises(LookupError) as raised:
        await run_together([workers.fail(0, first), workers.fail(0, second)])
    assert raised.value is first


async def test_cancelling_it_lets_each_tidy_up() -> None:
    workers = Workers()
    works = [workers.wait() for _ in range(3)]
    task = asyncio.create_task(run_together(works))
    while workers.num_waiting < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert workers.num_tidy == 3
