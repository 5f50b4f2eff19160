"""Timing of named pieces of work that call each other."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Counts the calls of each piece, and its seconds without those of the pieces inside it."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], object] | None = None,
    ) -> None:
        """``synchronize`` waits for the device, on which work may go on after a call returns."""
        self._clock = clock
        self._synchronize = synchronize
        # For each thread, the seconds of pieces inside the running ones.
        self._stacks = threading.local()
        self._totals: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls ``function`` and counts its time under ``name``."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stack: list[float] = self._stacks.__dict__.setdefault("within", [])
            stack.append(0.0)
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = self._now() - begin
                within = stack.pop()
                total = self._totals.setdefault(name, [0, 0.0])
                total[0] += 1
                total[1] += seconds - within
                if stack:
                    stack[-1] += seconds

        return wrapper

    def reset(self) -> None:
        self._totals.clear()

    def totals(self) -> dict[str, list[float]]:
        """Return (calls, seconds) by name."""
        return {name: list(total) for name, total in self._totals.items()}

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
