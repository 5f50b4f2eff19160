"""The ``fathom`` command in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

FATHOM = Path(sys.executable).with_name("fathom")


def fathom(
    *arguments: str | Path, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, whatever its exit code."""
    return subprocess.run(
        [FATHOM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**variables),
        check=False,
    )


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without settings of Fathom and without the Hub."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("FATHOM_")
    }
    return inherited | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"} | variables


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
