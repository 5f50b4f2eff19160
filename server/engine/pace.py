"""The pace of measurements that run beside requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Returns when the next part may be run.
Gate = Callable[[], Awaitable[None]]

# Measurements are made by way of many objects, none of which has to do with load.
_gate: ContextVar[Gate | None] = ContextVar("gate of measurements", default=None)


@contextmanager
def measuring_after(gate: Gate) -> Iterator[None]:
    """Have the engine wait for ``gate`` before each part of what is measured in this context."""
    token = _gate.set(gate)
    try:
        yield
    finally:
        _gate.reset(token)


def present_gate() -> Gate | None:
    """Return what measurements in this context wait for; None: nothing."""
    return _gate.get()
