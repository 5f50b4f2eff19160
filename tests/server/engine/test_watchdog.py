"""An engine that has stopped answering is killed, and one that computes is not."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from server.engine.base import EngineDead
from server.engine.watchdog import Watchdog
from tests.server.rpc.toy_engine import ToyEngine

BUSY = "print(flush=True)\nwhile True: pass"
IDLE = "import signal\nprint(flush=True)\nsignal.pause()"
# The kernel has a process wait for its child of vfork as it does for a disk. The child has the
# memory of its parent, and so does nothing but wait, too.
WAITS_FOR_DEVICE = """
import ctypes
libc = ctypes.CDLL(None)
print(flush=True)
libc.vfork()
libc.sleep(1000)
"""


class EngineOfProcess(ToyEngine):
    """A toy engine whose life is that of a process."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()  # its start, which is work, is over
        self.process.stdout.close()
        self.answers = True
        self.num_pings = 0
        self.num_looks = 0

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def process_ids(self) -> list[int]:
        self.num_looks += 1
        return [self.process.pid]

    async def ping(self) -> None:
        self.num_pings += 1
        while not self.answers:
            if not self.is_alive:
                raise EngineDead("killed")
            await asyncio.sleep(0.01)


@pytest.fixture
def engines() -> Iterator[list[EngineOfProcess]]:
    made: list[EngineOfProcess] = []
    yield made
    for engine in made:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(engine.process.pid)
            for each in (*process.children(recursive=True), process):
                each.kill()
        engine.process.wait()


async def until_waiting_for_device(engine: EngineOfProcess) -> None:
    process = psutil.Process(engine.process.pid)
    while process.status() != psutil.STATUS_DISK_SLEEP:
        await asyncio.sleep(0.01)


async def killed(
    engine: EngineOfProcess, *, num_looks: int, timeout: float, still: float, stopped: float
) -> bool:
    """Return whether the watchdog kills the engine within ``num_looks`` looks at it."""
    seconds = {"stall_seconds": still, "stopped_seconds": stopped}
    watchdog = Watchdog(engine, timeout, poll_seconds=0.05, **seconds)
    task = asyncio.create_task(watchdog.run())
    try:
        last = engine.num_looks + num_looks
        while not task.done() and engine.is_alive and engine.num_looks < last:
            await asyncio.sleep(0.01)
        return not engine.is_alive
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_one_that_answers_lives(engines: list[EngineOfProcess]) -> None:
    engine = EngineOfProcess(IDLE)
    engines.append(engine)
    assert not await killed(engine, num_looks=20, timeout=0.1, still=0.1, stopped=0.1)
    assert engine.num_pings > 1


async def test_one_that_is_busy_has_the_whole_time(
    engines: list[EngineOfProcess], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineOfProcess(BUSY)
    engines.append(engine)
    engine.answers = False
    # It computes, so that only the longest of the times counts.
    assert not await killed(engine, num_looks=30, timeout=1000, still=5, stopped=0.05)
    with caplog.at_level(logging.ERROR):
        assert await killed(engine, num_looks=1000, timeout=0.5, still=5, stopped=5)
    assert "has not answered for 0.5" in caplog.text


async def test_one_that_does_nothing_at_all(
    engines: list[EngineOfProcess], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineOfProcess(IDLE)
    engines.append(engine)
    engine.answers = False
    assert await killed(engine, num_looks=1000, timeout=1000, still=0.5, stopped=1000)
    assert "has not answered or done anything" in caplog.text


async def test_one_that_waits_for_a_disk_has_the_whole_time(
    engines: list[EngineOfProcess],
) -> None:
    engine = EngineOfProcess(WAITS_FOR_DEVICE)
    engines.append(engine)
    engine.answers = False
    await until_waiting_for_device(engine)
    assert not await killed(engine, num_looks=40, timeout=1000, still=0.5, stopped=1000)


async def test_one_that_waits_for_a_disk_for_too_long(
    engines: list[EngineOfProcess], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineOfProcess(WAITS_FOR_DEVICE)
    engines.append(engine)
    engine.answers = False
    await until_waiting_for_device(engine)
    assert await killed(engine, num_looks=1000, timeout=1, still=0.2, stopped=1000)
    assert "has not answered for 1" in caplog.text
    assert "1 threads wait for a disk or another device" in caplog.text


async def test_one_that_was_stopped(
    engines: list[EngineOfProcess], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineOfProcess(BUSY)
    engines.append(engine)
    engine.answers = False
    engine.process.send_signal(signal.SIGSTOP)
    assert await killed(engine, num_looks=1000, timeout=1000, still=1000, stopped=0.2)
    assert "was stopped by a signal" in caplog.text


async def test_one_that_has_taken_the_place_of_a_dead_one_is_not_held_for_it(
    engines: list[EngineOfProcess],
) -> None:
    """Whatever the dead one was asked, it never answers."""
    engine, successor = EngineOfProcess(IDLE), EngineOfProcess(IDLE)
    engines += [engine, successor]
    unanswered = asyncio.Event()

    async def ping() -> None:
        engine.num_pings += 1
        if engine.num_pings == 1:
            await unanswered.wait()

    engine.ping = ping  # type: ignore[method-assign]
    watching = asyncio.create_task(
        killed(engine, num_looks=40, timeout=1000, still=0.5, stopped=1000)
    )
    while engine.num_pings == 0:
        await asyncio.sleep(0.01)
    dead, engine.process = engine.process, successor.process
    dead.kill()
    dead.wait()
    assert not await watching
    assert engine.num_pings > 1
