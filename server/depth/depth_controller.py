"""The controller of automatic depth: decides how far depth is turned down under load.

The levels form a ladder of rungs, the deepest first. When a latency exceeds its target, depth goes
down at once: by one rung, or by as many as it takes to keep up with the requests that arrive. When
load has been low for long enough, depth goes up by one rung. Load is low if the rung above would
meet the targets as well, judged by how much slower it is. If a rise soon turns out to have been a
mistake, the next one has to wait twice as long, so that depth does not swing under a load between
two rungs.

The controller measures nothing and has no clock: all times are given to it, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The least time between two steps down: the effect of a step shows only after the waiting requests
# have started.
_MIN_DESCENT_SECONDS = 2.0
# Depth goes up if the rung above is expected to use at most this share of the targets.
_MAX_USE_AFTER_RISE = 0.8
# At or below this share of the targets, the controller forgets what it has learned of the load.
_MAX_IDLE_USE = 0.5
_MAX_HOLD_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Targets:
    """Target latencies, in seconds."""

    time_to_first_token: float
    inter_token_latency: float


@dataclass(frozen=True, slots=True)
class Load:
    """The load at one moment.

    Latencies are in seconds, 0.0 if there are no requests. ``utilization`` is the share of the
    engine's slots that are taken. ``overload`` is the number of requests that arrive for each one
    that starts.
    """

    time_to_first_token: float
    inter_token_latency: float
    utilization: float
    overload: float = 1.0


class DepthController:
    """Holds the present rung, 0 to the number of rungs - 1."""

    def __init__(self, targets: Targets, hold_seconds: float) -> None:
        """``hold_seconds`` is how long load has to be low before depth goes up by one rung."""
        self._targets = targets
        self._base_hold = hold_seconds
        self._hold = hold_seconds
        self._rung = 0
        self._changed_at = float("-inf")
        self._risen_at = float("-inf")
        # Since when load has been low, and next to nothing; None: it is not.
        self._low_since: float | None = None
        self._idle_since: float | None = None

    @property
    def rung(self) -> int:
        return self._rung

    def renumber(self, rung: int) -> None:
        """Call the present rung by another number, because others have come or gone."""
        self._rung = rung

    def update(self, now: float, load: Load, speedups: Sequence[float]) -> int:
        """Return the rung for this load.

        ``speedups`` has one entry for each rung: how much faster it is than the first.
        """
        last = len(speedups) - 1
        self._rung = min(self._rung, last)
        pressure = max(
            load.time_to_first_token / self._targets.time_to_first_token,
            load.inter_token_latency / self._targets.inter_token_latency,
        )
        self._note_idleness(now, max(pressure, load.utilization) * speedups[self._rung])
        if pressure > 1:
            self._low_since = None
            if self._rung < last and now - self._changed_at >= _MIN_DESCENT_SECONDS:
                if now - self._risen_at < 2 * self._hold:
                    self._hold = min(2 * self._hold, _MAX_HOLD_SECONDS)
                needed = speedups[self._rung] * load.overload
                rungs = range(self._rung + 1, last)
                enough = next((rung for rung in rungs if speedups[rung] >= needed), last)
                self._move(now, enough - self._rung if load.overload > 1 else 1)
            return self._rung
        if self._rung == 0:
            return 0
        slowdown = speedups[self._rung] / speedups[self._rung - 1]
        if max(pressure, load.utilization) * slowdown > _MAX_USE_AFTER_RISE:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - max(self._low_since, self._changed_at) >= self._hold:
            self._move(now, -1)
        return self._rung

    def _move(self, now: float, step: int) -> None:
        self._rung += step
        self._changed_at = now
        if step < 0:
            self._risen_at = now
        self._low_since = None

    def _note_idleness(self, now: float, use: float) -> None:
        """Go back to the normal hold time once there has been next to no load for long.

        ``use`` is the share of the targets that the load would take on the first rung.
        """
        if use > _MAX_IDLE_USE:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= self._base_hold:
            self._hold = self._base_hold
