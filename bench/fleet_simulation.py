"""A fleet of replicas under a trace of requests, second by second.

Work is counted in generated tokens. Replicas share one queue, first come first served, and each
works at the speed of the level in force; a request waits until the work before it is done. That
leaves out what a simulation of single engines would show: batches, prompts that share a prefix,
and requests that are unlike each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# What deploy/components/autoscaling-keda asks for: of each replica's streams, this share in use,
# and replicas that are degraded for this share of the time.
_LOAD_TARGET = 0.75
_DEGRADED_TARGET = 0.5
_DEGRADED_WINDOW_SECONDS = 300
_POLL_SECONDS = 15
# Requests run for some seconds, so their number does not follow every lull.
_BUSY_WINDOW_SECONDS = 30
_SCALE_DOWN_SECONDS = 600


@dataclass(frozen=True, slots=True)
class MeasuredLevel:
    """An operating point: layers, tokens per second of a replica, and what is left of quality."""

    depth: int
    tokens_per_second: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests, or crowds that come at once: when, in seconds and in order, and their work."""

    arrivals: npt.NDArray[np.float64]
    work: npt.NDArray[np.float64]

    @property
    def seconds(self) -> int:
        return int(self.arrivals[-1]) + 1


@dataclass(frozen=True, slots=True)
class Strategy:
    """What answers load: replicas, depth, or both."""

    name: str
    scales: bool
    changes_depth: bool


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What all strategies have in common; times in seconds."""

    # Replicas at the beginning, and at least.
    replicas: int
    # Streams of a replica at full load, at which the speeds were measured.
    streams: int
    # Mean work of a request, in tokens.
    tokens_per_request: float
    start_seconds: int
    target_seconds: float
    hold_seconds: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a strategy costs, and what users get."""

    replica_hours: float
    within_target: float
    wait_p99: float
    # Means over the work that was done.
    mean_depth: float
    mean_agreement: float
    most_replicas: int


def simulate(
    trace: Trace, levels: Sequence[MeasuredLevel], strategy: Strategy, options: FleetOptions
) -> Outcome:
    """Return what comes of the trace. ``levels`` begin with the deepest.

    It goes on after the last arrival until the queue is empty. Raises :class:`ValueError` for a
    trace or levels without entries.
    """
    if not len(trace.arrivals) or not levels:
        raise ValueError("a trace needs requests, and a fleet needs levels")
    arriving = np.bincount(trace.arrivals.astype(int), weights=trace.work)
    fleet = _Fleet(levels, strategy, options)
    done: list[float] = [0.0]
    second = 0
    while second < len(arriving) or fleet.backlog > 1e-9:
        fleet.step(second, float(arriving[second]) if second < len(arriving) else 0.0)
        done.append(fleet.done)
        second += 1
    # A request begins when what came before it is done.
    before = np.cumsum(trace.work) - trace.work
    begins = np.interp(before, done, np.arange(len(done), dtype=float))
    waits = np.maximum(0.0, begins - trace.arrivals)
    return Outcome(
        replica_hours=fleet.replica_seconds / 3600,
        within_target=float((waits <= options.target_seconds).mean()),
        wait_p99=float(np.percentile(waits, 99)),
        mean_depth=fleet.depth_work / fleet.done,
        mean_agreement=fleet.agreement_work / fleet.done,
        most_replicas=fleet.most_replicas,
    )


class _Fleet:
    """The replicas and their queue at one moment."""

    def __init__(
        self,
        levels: Sequence[MeasuredLevel],
        strategy: Strategy,
        options: FleetOptions,
    ) -> None:
        self._levels = levels if strategy.changes_depth else levels[:1]
        self._strategy = strategy
        self._options = options
        self._ready = options.replicas
        # When the replicas that start will be ready, oldest first.
        self._starting: deque[tuple[int, int]] = deque()
        self._level = 0
        self._calm_since = 0
        # Share of the capacity that was used, in the last seconds.
        self._busy: deque[float] = deque(maxlen=_BUSY_WINDOW_SECONDS)
        self._degraded: deque[bool] = deque(maxlen=_DEGRADED_WINDOW_SECONDS)
        self._wanted: deque[int] = deque(maxlen=_SCALE_DOWN_SECONDS // _POLL_SECONDS)
        self.backlog = 0.0
        self.done = 0.0
        self.replica_seconds = 0.0
        self.depth_work = 0.0
        self.agreement_work = 0.0
        self.most_replicas = options.replicas

    def step(self, second: int, work: float) -> None:
        """Let a second pass, in which so much work comes."""
        while self._starting and self._starting[0][0] <= second:
            self._ready += self._starting.popleft()[1]
        self.backlog += work
        self._choose_level(second)
        level = self._levels[self._level]
        capacity = self._ready * level.tokens_per_second
        finished = min(self.backlog, capacity)
        self._busy.append(finished / capacity)
        self.backlog -= finished
        self.done += finished
        self.depth_work += finished * level.depth
        self.agreement_work += finished * level.agreement
        replicas = self._replicas
        self.replica_seconds += replicas
        self.most_replicas = max(self.most_replicas, replicas)
        self._degraded.append(self._level > 0)
        if self._strategy.scales and second % _POLL_SECONDS == 0:
            self._scale(second)

    @property
    def _replicas(self) -> int:
        return self._ready + sum(count for _, count in self._starting)

    def _choose_level(self, second: int) -> None:
        """Take fewer layers while the queue takes longer than it may, and more after a calm."""

        def wait(level: int) -> float:
            return self.backlog / (self._ready * self._levels[level].tokens_per_second)

        while wait(self._level) > self._options.target_seconds and (
            self._level + 1 < len(self._levels)
        ):
            self._level += 1
            self._calm_since = second
        if self._level and wait(self._level - 1) > self._options.target_seconds / 2:
            self._calm_since = second
        if self._level and second - self._calm_since >= self._options.hold_seconds:
            self._level -= 1
            self._calm_since = second

    def _scale(self, second: int) -> None:
        """Follow the autoscaler's formula: the larger of what load and degradation ask for."""
        waiting = self.backlog / self._options.tokens_per_request
        busy = sum(self._busy) / len(self._busy)
        running = busy * self._ready * self._options.streams
        wanted = math.ceil((waiting + running) / (_LOAD_TARGET * self._options.streams))
        degraded = sum(self._degraded) / len(self._degraded)
        wanted = max(wanted, math.ceil(self._ready * degraded / _DEGRADED_TARGET))
        wanted = max(wanted, self._options.replicas)
        # At most twice as many as there are, as the autoscaler's own rule has it.
        wanted = min(wanted, 2 * self._replicas)
        self._wanted.append(wanted)
        if wanted > self._replicas:
            more = wanted - self._replicas
            self._starting.append((second + self._options.start_seconds, more))
        elif max(self._wanted) < self._ready and not self._starting:
            self._ready = max(self._wanted)
