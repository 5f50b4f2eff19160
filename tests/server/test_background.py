"""Work in the background that dies, returns, or is stopped."""

from __future__ import annotations

import asyncio
import logging

import pytest

from server.background import BackgroundTask


class Work:
    """Fails with each of ``failures``, then waits until it is cancelled."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.num_runs = 0
        self.is_waiting = asyncio.Event()

    async def __call__(self) -> None:
        self.num_runs += 1
        if self.failures:
            raise self.failures.pop(0)
        self.is_waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.is_waiting.clear()


async def test_what_dies_is_logged_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(ValueError("first"), OSError("second"), asyncio.CancelledError())
    task = BackgroundTask("the work", lambda: work(), first_delay=0.01, max_delay=0.02)
    task.start()
    await work.is_waiting.wait()
    await task.stop()
    assert work.num_runs == 4
    assert not work.is_waiting.is_set()
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL] * 3
    assert caplog.messages == [
        "the work has died; it is started again in 0.01 s",
        "the work has died; it is started again in 0.02 s",
        "the work has died; it is started again in 0.02 s",
    ]
    assert "ValueError: first" in caplog.text
    assert "OSError: second" in caplog.text


async def test_what_returns_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    task = BackgroundTask("the work", work)
    task.start()
    await done.wait()
    await task.stop()
    assert caplog.messages == []


async def test_one_that_waits_to_be_started_again_can_be_stopped() -> None:
    work = Work(ValueError())
    task = BackgroundTask("the work", lambda: work(), first_delay=1e9, max_delay=1e9)
    task.start()
    while not work.num_runs:
        await asyncio.sleep(0)
    await task.stop()
    assert work.num_runs == 1


async def test_one_that_fails_as_it_is_stopped_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    is_waiting = asyncio.Event()

    async def work() -> None:
        is_waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("at the end")

    task = BackgroundTask("the work", work, first_delay=1e9, max_delay=1e9)
    task.start()
    await is_waiting.wait()
    await task.stop()
    assert caplog.messages == ["the work has failed as it was stopped"]


async def test_one_that_was_never_started_can_be_stopped() -> None:
    await BackgroundTask("the work", lambda: Work()()).stop()
