"""A simulation of an engine with recorded step times, and of the requests it serves.

Discrete events: each step runs one token of every request in the batch, and the prompts of those
that have just come into it. The time of a step in which depths are mixed is that of its layers,
each of which costs what it does for the rows that run it: between two recorded depths the time is
taken to grow in proportion to the layers, and between two batch sizes to the rows.
"""

from __future__ import annotations

import bisect
import functools
import json
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RECORDED = Path(__file__).with_name("step_times.json")


class StepTimes:
    """Seconds of steps and prompts, interpolated between recorded ones."""

    def __init__(self, path: Path = RECORDED) -> None:
        recorded = json.loads(path.read_text("utf-8"))
        self.steps: dict[int, dict[int, float]] = {
            int(depth): {int(rows): seconds for rows, seconds in by_rows.items()}
            for depth, by_rows in recorded["step_seconds"].items()
        }
        self._prompts = {int(d): seconds for d, seconds in recorded["prompt_seconds"].items()}
        self._prompt_tokens: int = recorded["prompt_tokens"]
        self.num_layers = max(self.steps)

    def uniform(self, depth: int, num_rows: int) -> float:
        """Return the time of a step whose rows all have one depth."""
        by_depth = [(d, _between(sorted(self.steps[d].items()), num_rows)) for d in self.steps]
        return _between(sorted(by_depth), depth)

    @functools.cache  # noqa: B019 - lives as long as the tests
    def step(self, rows: tuple[tuple[int, int], ...]) -> float:
        """Return the time of a step with these rows: (depth, number), shallowest first."""
        seconds, below = 0.0, 0
        num_rows = sum(number for _, number in rows)
        for depth, number in rows:
            # These rows run the layers from the depth before to this one.
            seconds += self.uniform(depth, num_rows)
            seconds -= self.uniform(below, num_rows) if below else 0.0
            below = depth
            num_rows -= number
        return seconds

    def prompt(self, depth: int, num_tokens: int) -> float:
        """Return the time that a prompt adds to its step."""
        per_token = _between(sorted(self._prompts.items()), depth) / self._prompt_tokens
        return per_token * num_tokens


def _between(points: Sequence[tuple[int, float]], x: float) -> float:
    """Interpolate, and go on in a straight line beyond the ends."""
    i = min(max(bisect.bisect_left([p for p, _ in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 1e-6)


@dataclass(slots=True)
class Request:
    arrived: float
    num_prompt_tokens: int
    num_tokens: int
    is_auto: bool = True
    depth: int = 0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True)
class EngineModel:
    """Runs at most ``num_places`` requests; the depth of each is asked for when it starts."""

    times: StepTimes
    num_places: int
    depth_of: Callable[[Request], int]
    on_first_token: Callable[[float], None]
    on_gaps: Callable[[float, int], None]
    now: float = 0.0
    waiting: deque[Request] = field(default_factory=deque)
    finished: list[Request] = field(default_factory=list)
    num_running: int = 0
    _num_steps: int = 0
    # By the step in which they end, and how many there are of each depth.
    _ends: defaultdict[int, list[Request]] = field(default_factory=lambda: defaultdict(list))
    _rows: Counter[int] = field(default_factory=Counter)

    def longest_wait(self) -> float:
        return self.now - self.waiting[0].arrived if self.waiting else 0.0

    @property
    def utilization(self) -> float:
        return self.num_running / self.num_places

    def step(self) -> None:
        """Run one step; the clock goes on by the time that it takes."""
        self._num_steps += 1
        seconds = self.times.step(tuple(sorted(self._rows.items()))) if self._rows else 0.0
        num_before = self.num_running
        begun = []
        while self.waiting and self.num_running < self.num_places:
            request = self.waiting.popleft()
            request.depth = self.depth_of(request)
            seconds += self.times.prompt(request.depth, request.num_prompt_tokens)
            self._rows[request.depth] += 1
            self._ends[self._num_steps + request.num_tokens - 1].append(request)
            self.num_running += 1
            begun.append(request)
        self.now += seconds
        if num_before:
            self.on_gaps(seconds * num_before, num_before)
        for request in begun:
            request.first_token = self.now
            self.on_first_token(self.now - request.arrived)
        for request in self._ends.pop(self._num_steps, ()):
            request.finished = self.now
            self.num_running -= 1
            self._rows[request.depth] -= 1
            if not self._rows[request.depth]:
                del self._rows[request.depth]
            self.finished.append(request)


def arrivals(
    rate: Callable[[float], float],
    seconds: float,
    seed: int,
    *,
    num_prompt_tokens: int = 64,
    num_tokens: int = 64,
    highest: float,
) -> Iterator[Request]:
    """Yield requests as a Poisson process whose rate, at most ``highest``, changes with time."""
    rng = random.Random(seed)
    now = 0.0
    while (now := now + rng.expovariate(highest)) < seconds:
        if rng.random() * highest < rate(now):
            yield Request(now, num_prompt_tokens, num_tokens)
