"""The output funnel: catches all output, so that every line has the format of the log.

Native code of gRPC and vLLM, the engine's processes and the Python interpreter write to the
standard streams directly.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

_END = b"\0end of output\n"
_MAX_LINE_BYTES = 65536
_LAST_LINES_SECONDS = 2.0


class OutputFunnel:
    """Reads what this process and its children write to their standard streams."""

    def __init__(self) -> None:
        """Take over file descriptors 1 and 2; output is held until :meth:`open`."""
        self._stdout, self._stderr = os.dup(1), os.dup(2)
        # The former stderr.
        self.stream: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
        self._read_end, write_end = os.pipe()
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(write_end)
        self._thread: threading.Thread | None = None

    def open(self, on_line: Callable[[str], object]) -> None:
        """Call ``on_line`` for every line from now on, in a thread."""
        self._thread = threading.Thread(
            target=self._read, args=(on_line,), name="output", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Pass on what has been written, and give the streams back."""
        if self._thread is None:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, b"\n" + _END)
        self._thread.join(_LAST_LINES_SECONDS)
        self._thread = None
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)

    def _read(self, on_line: Callable[[str], object]) -> None:
        with os.fdopen(self._read_end, "rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)) not in (b"", _END):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    on_line(text)
