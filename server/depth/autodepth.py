"""Automatic depth: fewer layers under load, for requests that leave the depth to the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.depth.auto_rules import AutoRules, common_ladder, ladder, nearest, speedup
from server.depth.depth_choice import RequestKind
from server.depth.depth_controller import DepthController, Load
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.depth.sliding_window import SlidingWindow

logger = logging.getLogger(__name__)

# Latencies and rates are those of this many last seconds.
_WINDOW_SECONDS = 2.0
# With fewer starts in the window, the rate of starts is not known well enough.
_MIN_STARTS_FOR_RATE = 8
# So long after the last request to score, levels that only such requests may get are no rungs:
# to turn the depth down to them would help nobody.
_SCORE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class PresentLevels:
    """The levels for requests that start now, by what they ask for."""

    generate: Level
    score: Level

    def __str__(self) -> str:
        if self.generate == self.score:
            return self.generate.name
        return f"{self.generate.name}, {self.score.name} for Score"


class AutoDepth:
    """Measures latencies, and chooses the level of requests that leave the depth to the server."""

    def __init__(self, rules: AutoRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_tokens = SlidingWindow(_WINDOW_SECONDS)
        self._inter_token_latencies = SlidingWindow(_WINDOW_SECONDS)
        self._arrivals = SlidingWindow(_WINDOW_SECONDS)
        self._scores = SlidingWindow(_SCORE_SECONDS)
        self.set_rules(rules)

    @property
    def rung(self) -> int:
        """How many levels the depth has been turned down; 0 without load."""
        return self._controller.rung

    @property
    def rules(self) -> AutoRules:
        return self._rules

    def set_rules(self, rules: AutoRules) -> None:
        """Use these rules from now on, starting at the level without load."""
        self._rules = rules
        self._controller = DepthController(rules.targets, rules.hold_seconds)
        # The level of the present rung; None: the first one.
        self._level: Level | None = None

    def observe_arrival(self) -> None:
        """Count a request that has arrived."""
        self._arrivals.add(self._clock(), 0.0)

    def observe_score(self) -> None:
        """Count a request to score that leaves the depth to the server."""
        self._scores.add(self._clock(), 0.0)

    def observe(self, seconds: float, num_tokens: int | None) -> None:
        """Count a latency of a request.

        With ``num_tokens``, ``seconds`` is the time since the request's step before, and the new
        step brought this many tokens. Without, it is the time from arrival to the first token.
        """
        if num_tokens is None:
            self._first_tokens.add(self._clock(), seconds)
        else:
            self._inter_token_latencies.add(self._clock(), seconds, num_tokens)

    def choose(
        self, policy: DepthPolicy, *, num_waiting: int, longest_wait: float, utilization: float
    ) -> PresentLevels:
        """Return the levels for requests that start now.

        There is one controller, whose rungs are the levels that any of these requests may get.
        Each kind of request gets the shallowest of its own levels that is not beyond the rung.

        ``num_waiting`` requests have not started; the first of them has waited ``longest_wait``
        seconds. ``utilization`` is the share of the engine's slots that are taken.
        """
        now = self._clock()
        levels = self._rungs(policy, now)
        num_arrivals, num_starts = self._arrivals.count(now), self._first_tokens.count(now)
        # Time to first token is at least the longest wait so far. For a request that arrives now it
        # is at least the time in which all waiting requests start.
        first_token = max(self._first_tokens.mean(now), longest_wait)
        overload = 1.0
        if num_waiting and num_starts >= _MIN_STARTS_FOR_RATE:
            first_token = max(first_token, num_waiting * _WINDOW_SECONDS / num_starts)
            overload = max(1.0, num_arrivals / num_starts)
        load = Load(
            time_to_first_token=first_token,
            inter_token_latency=self._inter_token_latencies.mean(now),
            utilization=utilization,
            overload=overload,
        )
        before = self._controller.rung
        rung = self._controller.update(now, load, [speedup(policy, level) for level in levels])
        self._level = levels[rung]
        present = PresentLevels(
            *(
                nearest(policy, self._rules, levels[rung], ladder(policy, self._rules, kind))
                for kind in (RequestKind.GENERATE, RequestKind.SCORE)
            )
        )
        if rung != before:
            logger.info(
                "depth %s to level %s: %.3g s to first tokens, %.3g s between tokens, %.0f %% busy",
                "down" if rung > before else "up",
                present,
                load.time_to_first_token,
                load.inter_token_latency,
                100 * load.utilization,
            )
        return present

    def _rungs(self, policy: DepthPolicy, now: float) -> tuple[Level, ...]:
        """Return the levels of the controller, which stays at the level where it is."""
        kinds = [RequestKind.GENERATE]
        if self._scores.count(now):
            kinds.append(RequestKind.SCORE)
        levels = common_ladder(policy, self._rules, kinds)
        if self._level is not None:
            level = nearest(policy, self._rules, self._level, levels)
            self._controller.renumber(levels.index(level))
        return levels
