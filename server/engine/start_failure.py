"""The reason why an engine's process could not start.

That process logs the reason, but vLLM's error in the server's process only refers to the log. So
each process of vLLM also appends the exceptions that it logs to a file that the server reads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Names the file, in the environment that the engine's processes get.
_VARIABLE = "FATHOM_START_FAILURES"
# Phrases in errors of vLLM that only refer to the log of another process.
_HINTS = ("See root cause above", "See stack trace for root cause", "background process")
_MAX_CHARACTERS = 600


class EngineStartError(Exception):
    """vLLM cannot start with this model and these settings; the message has its reason."""


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """Turn errors that only refer to a log into :class:`EngineStartError` with the first reason.

    An exception with a reason of its own is left as it is.
    """
    with tempfile.TemporaryDirectory(prefix="fathom-start-") as directory:
        path = Path(directory) / "failures"
        os.environ[_VARIABLE] = str(path)
        try:
            yield
        except Exception as error:
            reported = path.read_text("utf-8") if path.is_file() else ""
            if not reported or not _is_hint(str(error)):
                raise
            raise EngineStartError(reported.splitlines()[0]) from error
        finally:
            del os.environ[_VARIABLE]


def report_start_failures() -> None:
    """Append the exceptions that this process logs to the file of :func:`named_failures`."""
    path = os.environ.get(_VARIABLE)
    logger = logging.getLogger("vllm")
    if path is None or any(isinstance(each, _Reporter) for each in logger.handlers):
        return
    logger.addHandler(_Reporter(Path(path)))


class _Reporter(logging.Handler):
    """Appends the reason of each exception that is logged, one a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or _is_hint(reason := reason_of(error)):
            return
        # The directory is removed at the end of the start.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{reason}\n")


def reason_of(error: BaseException) -> str:
    """Return the text of an exception in one line, or that of its cause if it has none."""
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())
        if text and not _is_hint(text):
            # The texts of other exceptions, such as KeyError, are no sentences without the name.
            is_plain = type(seen) in (ValueError, RuntimeError, OSError, NotImplementedError)
            return (text if is_plain else f"{type(seen).__name__}: {text}")[:_MAX_CHARACTERS]
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def _is_hint(text: str) -> bool:
    return any(hint in text for hint in _HINTS)
