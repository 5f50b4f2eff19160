"""``fathom serve`` and the signals of a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.fathom_command import FATHOM, environment
from tests.server.cli.served import START_SECONDS, Server, start_server


def test_restart_and_ctrl_c(server: Server, stories_model: Path, directory: Path) -> None:
    """A start with what the first one kept; Ctrl-C sends SIGINT to the engine's process, too."""
    again = start_server(stories_model, directory)
    try:
        deadline = time.monotonic() + START_SECONDS
        while (starting := again.fathom_in_process("health")).stdout == "":
            assert time.monotonic() < deadline
        assert (starting.returncode, starting.stdout) == (1, "NOT_SERVING\n")
        again.wait_until_serving()
        log = again.log.read_text()
        assert "Ranking the layers" not in log
        assert "Measuring quality" not in log

        generating = subprocess.Popen(
            [FATHOM, "generate", "Once", "--max-tokens", "480", "--ignore-eos"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(FATHOM_ADDRESS=again.address),
        )
        assert generating.stdout is not None
        first = generating.stdout.read(1)  # it runs
        os.killpg(again.process.pid, signal.SIGINT)
        rest, summary = generating.communicate(timeout=100)
        assert generating.returncode == 0, summary
        assert "480 tokens" in summary
        assert first + rest
        code, printed = again.end()
        assert code == 0
        assert printed.splitlines()[0].startswith(f"Serving {stories_model} (5 layers, ")
        assert f"on {again.address};" in printed
        assert "Traceback" not in again.log.read_text()
    finally:
        again.kill()


def test_signal_while_starting(stories_model: Path, tmp_path: Path) -> None:
    starting = start_server(stories_model, tmp_path)
    try:
        deadline = time.monotonic() + START_SECONDS
        while starting.fathom_in_process("health").stdout == "":
            assert time.monotonic() < deadline
        starting.process.terminate()
        assert starting.end() == (0, "")
    finally:
        starting.kill()
