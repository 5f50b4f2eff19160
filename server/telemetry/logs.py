"""The log of a server: its level, its format and where it is written."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

from server.telemetry.log_format import JsonLines, TextLines
from server.telemetry.output_funnel import OutputFunnel

LogFormat = Literal["text", "json"]

_TEXT_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger(__name__)


class Logs:
    """The log of a server."""

    def __init__(self, level: str, log_format: LogFormat) -> None:
        """Take over the root logger and, with JSON, all that is written to stdout and stderr."""
        self.console = Console(stderr=True)
        self._funnel: OutputFunnel | None = None
        handler: logging.Handler
        if log_format == "json":
            self._funnel = OutputFunnel()
            handler = logging.StreamHandler(self._funnel.stream)
            handler.setFormatter(JsonLines())
            self.console = Console(stderr=True, force_terminal=False)
            self._funnel.open(lambda line: handler.handle(_foreign(line)))
            atexit.register(self.close)
            sys.excepthook = _log_uncaught
        elif self.console.is_terminal:
            handler = RichHandler(console=self.console, show_path=False, log_time_format="%X")
            handler.setFormatter(TextLines("%(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(TextLines(_TEXT_LINE))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.captureWarnings(True)
        self.set_level(level)
        # Most warnings of these libraries are about how the engine is meant to run here.
        library_level = "INFO" if level == "debug" else "ERROR"
        for package in ("vllm", "torchao"):
            logging.getLogger(package).setLevel(library_level)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", library_level)
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", library_level.lower())

    @property
    def is_json(self) -> bool:
        return self._funnel is not None

    @property
    def has_lost_its_terminal(self) -> bool:
        """Whether the log was written to a terminal that has been closed."""
        return self.console.is_terminal and not os.isatty(sys.stderr.fileno())

    def set_level(self, level: str) -> None:
        """Write lines of this project of at least ``level``: debug, info, warning or error."""
        for package in ("server", "pruning"):
            logging.getLogger(package).setLevel(level.upper())

    def close(self) -> None:
        """Write the lines that have not been written yet; call this before the process ends."""
        if self._funnel is not None:
            self._funnel.close()


def _foreign(line: str) -> logging.LogRecord:
    """Return a log record for a line that was written to a standard stream."""
    return logging.LogRecord("output", logging.WARNING, "", 0, line, None, None)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logger.critical("the server ends with an error", exc_info=(kind, error, traceback))
