"""Decides how far depth is turned down under load.

A ladder of rungs, the first of which is the deepest. Depth goes down as soon as latency has
exceeded a target: a rung, or as many as it takes to keep up with the requests that come. It goes
up again, rung by rung, when load has been low for long, where low means
that the rung above would meet the targets, too, judged by how much slower it is. When a rise turns
out soon to have been a mistake, the next one has to wait twice as long, so that a load between
two rungs does not make the depth swing.

Nothing here measures anything or knows the time: times are given, in seconds of any clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Between two steps down: what a step does shows after the requests that wait have started.
_DESCENT_SECONDS = 2.0
# Of the targets, that the rung above is expected to use at most.
_COMFORT = 0.8
# Of the targets, at and below which what was learned of the load is forgotten.
_IDLE = 0.5
_MAX_HOLD_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Targets:
    """Latencies to keep, in seconds."""

    time_to_first_token: float
    inter_token_latency: float


@dataclass(frozen=True, slots=True)
class Load:
    """What requests see at one moment.

    Latencies are in seconds, 0.0 where there are no requests. ``utilization`` is the share of the
    engine's places that are taken. ``overload`` is how many requests come for each that starts.
    """

    time_to_first_token: float
    inter_token_latency: float
    utilization: float
    overload: float = 1.0


class DepthController:
    """Holds the present rung, 0 to the number of rungs - 1."""

    def __init__(self, targets: Targets, hold_seconds: float) -> None:
        """``hold_seconds``: how long load has to be low before depth goes up by one rung."""
        self._targets = targets
        self._base_hold = hold_seconds
        self._hold = hold_seconds
        self._rung = 0
        self._changed_at = float("-inf")
        self._risen_at = float("-inf")
        # Since when it has been like this; None: it is not.
        self._comfortable_since: float | None = None
        self._idle_since: float | None = None

    @property
    def rung(self) -> int:
        return self._rung

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
            self._comfortable_since = None
            if self._rung < last and now - self._changed_at >= _DESCENT_SECONDS:
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
        if max(pressure, load.utilization) * slowdown > _COMFORT:
            self._comfortable_since = None
        elif self._comfortable_since is None:
            self._comfortable_since = now
        elif now - max(self._comfortable_since, self._changed_at) >= self._hold:
            self._move(now, -1)
        return self._rung

    def _move(self, now: float, step: int) -> None:
        self._rung += step
        self._changed_at = now
        if step < 0:
            self._risen_at = now
        self._comfortable_since = None

    def _note_idleness(self, now: float, use: float) -> None:
        """Forget the mistakes of another load once there has been next to none for long.

        ``use`` is what the load would be on the first rung.
        """
        if use > _IDLE:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= self._base_hold:
            self._hold = self._base_hold
