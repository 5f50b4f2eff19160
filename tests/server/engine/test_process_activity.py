"""Activity of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from server.engine.process_activity import ProcessActivity, activity_of


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that writes a line for each that it reads; it has written the first."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def step(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.stdout.readline()


def activity(process: subprocess.Popen[bytes]) -> ProcessActivity:
    return activity_of([psutil.Process(process.pid)])


def test_one_that_does_nothing() -> None:
    with running("print(flush=True); input()") as process:
        before = activity(process)
        while activity(process).has_worked_since(before):  # it begins to wait
            before = activity(process)
        assert not activity(process).has_worked_since(before)
        assert not before.is_stopped
        assert before.num_waiting_for_device == 0


def test_processor_time_of_another_thread() -> None:
    program = """
import threading
def work():
    while True: pass
threading.Thread(target=work, daemon=True).start()
print(flush=True)
input()
"""
    with running(program) as process:
        before = activity(process)
        while not (now := activity(process)).has_worked_since(before):
            pass
        assert now.counters.cpu_ticks > before.counters.cpu_ticks


def test_bytes_that_are_written(tmp_path: Path) -> None:
    program = f"""
import os
print(flush=True)
while True:
    input()
    with open({str(tmp_path / "file")!r}, "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    print(flush=True)
"""
    with running(program) as process:
        before = activity(process)
        step(process)
        after = activity(process)
        assert after.counters.num_bytes >= before.counters.num_bytes + (1 << 20)
        assert f"{after.counters.num_bytes} bytes from and to disks" in str(after)


def test_one_that_is_stopped() -> None:
    with running("print(flush=True); input()") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert activity(process).is_stopped


def test_one_that_has_ended() -> None:
    with running("print(flush=True); input()") as process:
        found = psutil.Process(process.pid)
        process.kill()
        process.wait()
        assert activity_of([found]) == activity_of([])
