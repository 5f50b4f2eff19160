"""A simulation of an engine with recorded step times, and of the requests it serves.

Discrete events: each step runs one token of every request in the batch, and the prompts of those
that have just come into it. The time of a step in which depths are mixed is that of its layers,
each of which costs what it does for the rows that run it: between two recorded depths the time is
taken to grow in proportion to the layers, and between two batch sizes to the rows.
"""

from __future__ import annotations

import bisect
import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RECORDED = Path(__file__).with_name("step_times.json")


class StepTimes:
    """Seconds of steps and prompts, interpolated between what was recorded."""

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
        """Return the time of a step with so many rows, all of one depth."""
        by_depth = [(d, _between(sorted(self.steps[d].items()), num_rows)) for d in self.steps]
        return _between(sorted(by_depth), depth)

    def step(self, depths: Sequence[int]) -> float:
        """Return the time of a step with one row of each of ``depths``."""
        if not depths:
            return 0.0
        ordered = sorted(depths)
        seconds, below = 0.0, 0
        for i, depth in enumerate(ordered):
            if depth > below:
                num_rows = len(ordered) - i  # those that run the layers from there to this depth
                seconds += self.uniform(depth, num_rows) - (
                    self.uniform(below, num_rows) if below else 0.0
                )
                below = depth
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
    num_generated: int = 0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True)
class EngineModel:
    """Runs at most ``num_places`` requests; the depth of each is asked for when it starts."""

    times: StepTimes
    num_places: int
    depth_of: Callable[[Request], int]
    on_first_token: Callable[[float, float], None]
    on_gap: Callable[[float, float, int], None]
    now: float = 0.0
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    def longest_wait(self) -> float:
        return self.now - self.waiting[0].arrived if self.waiting else 0.0

    @property
    def utilization(self) -> float:
        return len(self.running) / self.num_places

    def step(self) -> None:
        """Run one step; the clock goes on by the time that it takes."""
        seconds = self.times.step([request.depth for request in self.running])
        begun = []
        while self.waiting and len(self.running) + len(begun) < self.num_places:
            request = self.waiting.popleft()
            request.depth = self.depth_of(request)
            seconds += self.times.prompt(request.depth, request.num_prompt_tokens)
            begun.append(request)
        self.now += seconds
        if self.running:
            self.on_gap(self.now, seconds * len(self.running), len(self.running))
        for request in begun:
            request.first_token = self.now
            self.on_first_token(self.now, self.now - request.arrived)
        self.running += begun
        for request in self.running:
            request.num_generated += 1
            if request.num_generated == request.num_tokens:
                request.finished = self.now
                self.finished.append(request)
        self.running = [r for r in self.running if not r.finished]


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
