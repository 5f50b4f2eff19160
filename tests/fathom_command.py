"""The ``fathom`` command, in a process of its own and in this one."""

from __future__ import annotations

import io
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import cycle, islice
from pathlib import Path
from unittest.mock import patch

import pytest

from server.cli import main

# How long a command may take before a test gives up; none is meant to take that long.
PATIENCE = 240.0
FATHOM = Path(sys.executable).with_name("fathom")
# The programs of the environment that has lm-evaluation-harness, which servers do without.
_EVALUATION = Path(sys.prefix) / "evaluation" / "bin"

# Ports below those that the kernel gives to connections, a thousand for each worker of a run;
# another run on this machine most likely begins elsewhere.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_FIRST_PORT = 12_000 + 1_000 * (_WORKER % 20)
_START = random.randrange(1_000)
_ports = cycle(_FIRST_PORT + (_START + number) % 1_000 for number in range(1_000))


def evaluation_program(name: str) -> Path:
    """Return a program that comes with lm-evaluation-harness; without it the test is skipped."""
    program = _EVALUATION / name
    if not program.exists():
        pytest.skip(f"{program} is absent; make setup installs it")
    return program


def fathom(
    *arguments: str | Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own to its end, whatever its exit code."""
    return subprocess.run(
        [FATHOM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**variables),
        timeout=PATIENCE,
        check=False,
    )


def fathom_in_process(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, for what it does before it starts an engine or a worker.

    A process of its own would import torch and transformers first, which takes seconds.
    """
    command = ["fathom", *map(str, arguments)]
    stdout, stderr = io.StringIO(), io.StringIO()
    exit_code: object = 0
    with (
        patch.object(sys, "argv", command),
        patch.dict(os.environ, environment(**variables), clear=True),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        _fresh_logging(),
        _kept_signals(),
    ):
        try:
            main()
        except SystemExit as end:
            exit_code = end.code or 0
    assert isinstance(exit_code, int)
    return subprocess.CompletedProcess(command, exit_code, stdout.getvalue(), stderr.getvalue())


@contextmanager
def _fresh_logging() -> Iterator[None]:
    """Let the command set up the log as in a new process, and undo what it has set up."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, ("server", "pruning", "vllm", "torchao"))]
    levels = [logger.level for logger in loggers]
    handlers, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = handlers
        logging.captureWarnings(False)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _kept_signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without settings of Fathom and without the Hub."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("FATHOM_")
    }
    return inherited | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"} | variables


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens, and which other workers and connections do not get."""
    return list(islice(filter(_is_free, _ports), count))


def _is_free(port: int) -> bool:
    with socket.socket() as attempt:
        try:
            attempt.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
