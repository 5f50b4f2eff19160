"""Frame of the commands that write a checkpoint without a server."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from server.cli.problems import report_problem
from server.config import Settings, warn_of_old_names


def run_offline(settings: Settings, work: Callable[[], None]) -> None:
    """Do the work; if that fails, print why and exit: 2 for wrong settings, 1 for other errors."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("server", "pruning"):
        logging.getLogger(package).setLevel(settings.log_level.upper())
    warn_of_old_names(settings.old_names)
    signal.signal(signal.SIGTERM, _exit)  # exceptions remove what is half written

    # Imported here to keep the other commands quick.
    from pruning.quantization import QuantizationFailed
    from server.model.inputs import StartError

    try:
        work()
    except StartError as error:
        report_problem(str(error))
        sys.exit(2)
    except (QuantizationFailed, OSError) as error:
        report_problem(str(error))
        sys.exit(1)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
