"""Whether plots can be drawn."""

from __future__ import annotations

import importlib.util


class MatplotlibMissing(Exception):
    """matplotlib is not installed."""


def check_matplotlib() -> None:
    """Raise :class:`MatplotlibMissing` if matplotlib is not installed, without importing it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MatplotlibMissing(
            "plots need matplotlib: install it alone or with the extra, as in "
            "pip install 'fathom-server[bench]'"
        )
