"""A ``fathom serve`` of a small model, in a process group of its own, as in a terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fathom_command import FATHOM, environment, fathom, fathom_in_process, free_ports

# An engine starts in half a minute on a busy machine; this is for one that never does.
START_SECONDS = 200.0
NUM_LAYERS = 5


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    log: Path

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.fathom_in_process("health").returncode != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def fathom(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return fathom(*arguments, stdin=stdin, FATHOM_ADDRESS=self.address)

    def fathom_in_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return fathom_in_process(*arguments, FATHOM_ADDRESS=self.address)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was printed."""
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed

    def kill(self) -> None:
        """End the server and its processes, if they still run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def start_server(model: Path, directory: Path, *arguments: str) -> Server:
    (port,) = free_ports(1)
    log = directory / f"log-{port}"
    command: list[str | Path] = [
        FATHOM,
        "serve",
        "--model",
        model,
        "--port",
        str(port),
        "--metrics-port",
        "0",
    ]
    limits = ["--kv-cache-gib", "0.25", "--max-num-seqs", "16", "--calibration-tokens", "1024"]
    limits += ["--compile-layers", "false", "--startup-seconds", "inf"]
    limits += ["--repair", "none"]
    state: list[str | Path] = ["--quality-tokens", "1024", "--state-dir", directory / "state"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *limits, *state, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(),
            process_group=0,
        )
    return Server(process, f"127.0.0.1:{port}", log)
