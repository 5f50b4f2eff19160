"""Gaps in the load, which measurements wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.engine.pace import Gate

# How soon a gap is noticed.
_POLL_SECONDS = 0.05
# A part of a measurement waits no longer than this. A measurement has some hundred parts at most,
# probes of two depths and dense about eight hundred.
_PATIENCE_SECONDS = 2.0


def gate_at_gaps(is_busy: Callable[[], bool]) -> Gate:
    """Return a gate that is shut while ``is_busy``, but never for long."""

    async def wait() -> None:
        waited = 0.0
        while waited < _PATIENCE_SECONDS and is_busy():
            await asyncio.sleep(_POLL_SECONDS)
            waited += _POLL_SECONDS

    return wait
