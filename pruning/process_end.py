"""How a process that works for this one has ended, in words."""

from __future__ import annotations

import os
import re
import signal
from typing import IO

# Only the end of the process's output is read.
_TAIL_BYTES = 64 << 10
_MAX_MESSAGE = 300
# Colours and movements of a terminal's cursor.
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shortened(message: str) -> str:
    """Return the message in one line of moderate length."""
    line = " ".join(message.split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."


def how_it_ended(work: str, code: int, output: IO[bytes]) -> str:
    """Return how the process that does ``work``, such as "heals", ended without telling why.

    ``code`` is its exit code, negative for a signal; ``output`` has all that it has printed.
    """
    if code == -signal.SIGKILL:
        return (
            f"the process that {work} was killed (SIGKILL), as the system does when memory runs out"
        )
    cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"the process that {work} {cause}; its last words: {_last_line(output) or 'none'}"


def _last_line(output: IO[bytes]) -> str:
    output.seek(max(output.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
    text = _ANSI.sub("", output.read().decode("utf-8", "replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return shortened(lines[-1]) if lines else ""
