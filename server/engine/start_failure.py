"""Why an engine's process could not start, as that process found it.

vLLM logs the reason there, and tells the process that started it only to look above. So each
process of vLLM also writes what it logs of an exception to a file that the server reads.
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
# What vLLM says where another process knows more.
_HINTS = ("See root cause above", "See stack trace for root cause", "background process")
_MAX_CHARACTERS = 600


class EngineStartError(Exception):
    """vLLM cannot start with this model and these settings; the message has its reason."""


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """Raise :class:`EngineStartError` with the first reason for what vLLM raises within.

    An exception that says more than where to look is left as it is.
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
    """Write what this process logs of exceptions where :func:`named_failures` finds it."""
    path = os.environ.get(_VARIABLE)
    logger = logging.getLogger("vllm")
    if path is None or any(isinstance(each, _Reporter) for each in logger.handlers):
        return
    logger.addHandler(_Reporter(Path(path)))


class _Reporter(logging.Handler):
    """Appends the reason of each exception that is logged, one in a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or _is_hint(reason := reason_of(error)):
            return
        # Once the start is over, so is the directory.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{reason}\n")


def reason_of(error: BaseException) -> str:
    """Return the reason for an exception in one line; that of its cause where it has none."""
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())
        if text and not _is_hint(text):
            # The words of other exceptions, such as KeyError's, are no sentence by themselves.
            is_plain = type(seen) in (ValueError, RuntimeError, OSError, NotImplementedError)
            return (text if is_plain else f"{type(seen).__name__}: {text}")[:_MAX_CHARACTERS]
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def _is_hint(text: str) -> bool:
    return any(hint in text for hint in _HINTS)
