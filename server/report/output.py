"""The directory of a report: the page, its plots, the numbers, and what was measured so far."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from pruning.durable import replace_file
from server.errors import InvalidArgument
from server.report.document import ReportDocument
from server.state import StateDirectory

PAGE = "index.html"
NUMBERS = "report.json"
PLOTS = "plots"
_MEASUREMENTS = "measurements"
# Names the model from the first measurement on, before there are numbers to show.
_MODEL = "model.txt"

logger = logging.getLogger(__name__)


class ReportDirectory:
    """``OUT`` of ``fathom report``."""

    def __init__(self, path: Path, model_fingerprint: str) -> None:
        """Open or make the directory.

        Raises :class:`InvalidArgument` for what is no directory, cannot be written, holds files
        that are not a report's, or the report of another model.
        """
        self.path = path
        self.measurements = path / _MEASUREMENTS
        allowed = "a new directory, or that of an earlier report of this model"
        try:
            if path.exists() and not path.is_dir():
                raise InvalidArgument("OUT", str(path), f"{allowed}; this is a file")
            found = {entry.name for entry in path.iterdir()} if path.exists() else set()
            if found and _MEASUREMENTS not in found:
                others = ", ".join(sorted(found)[:3])
                raise InvalidArgument("OUT", str(path), f"{allowed}; this one holds {others}")
            self.measurements.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            named = self.measurements / _MODEL
            if named.exists() and named.read_text("utf-8").strip() != model_fingerprint:
                raise InvalidArgument(
                    "OUT", str(path), f"{allowed}; this one holds the report of another model"
                )
            if not named.exists():
                replace_file(named, f"{model_fingerprint}\n".encode())
        except OSError as error:
            reason = error.strerror or os.fspath(path)
            raise InvalidArgument("OUT", str(path), f"a directory to write ({reason})") from error

    def state(self) -> StateDirectory:
        """Return what keeps measurements, each under a key of what it depends on."""
        return StateDirectory(self.measurements)

    def earlier(self) -> ReportDocument | None:
        """Return the numbers of an earlier run; None where there are none that can be read."""
        path = self.path / NUMBERS
        try:
            return ReportDocument.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("%s is not used and will be written anew: %s", path, error)
            return None

    def save(self, document: ReportDocument) -> None:
        replace_file(self.path / NUMBERS, document.to_json().encode())

    def save_page(self, html: str) -> Path:
        path = self.path / PAGE
        replace_file(path, html.encode())
        return path
