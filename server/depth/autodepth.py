"""Automatic depth: fewer layers under load, for requests that leave the depth to the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from server.depth.auto_rules import AutoRules, ladder, speedup
from server.depth.depth_controller import DepthController, Load
from server.depth.levels import Level
from server.depth.policy import DepthPolicy
from server.depth.sliding_window import SlidingWindow

logger = logging.getLogger(__name__)

# Latencies and rates are those of this many last seconds.
_WINDOW_SECONDS = 2.0
# With fewer starts in the window, the rate of starts is not known well enough.
_MIN_STARTS_FOR_RATE = 8


class AutoDepth:
    """Measures latencies, and chooses the level of requests that leave the depth to the server."""

    def __init__(self, rules: AutoRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_tokens = SlidingWindow(_WINDOW_SECONDS)
        self._inter_token_latencies = SlidingWindow(_WINDOW_SECONDS)
        self._arrivals = SlidingWindow(_WINDOW_SECONDS)
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

    def observe_arrival(self) -> None:
        """Count a request that has arrived."""
        self._arrivals.add(self._clock(), 0.0)

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
    ) -> Level:
        """Return the level for requests that start now.

        ``num_waiting`` requests have not started; the first of them has waited ``longest_wait``
        seconds. ``utilization`` is the share of the engine's slots that are taken.
        """
        now = self._clock()
        levels = ladder(policy, self._rules)
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
        if rung != before:
            logger.info(
                "depth %s to level %s: %.3g s to first tokens, %.3g s between tokens, %.0f %% busy",
                "down" if rung > before else "up",
                levels[rung].name,
                load.time_to_first_token,
                load.inter_token_latency,
                100 * load.utilization,
            )
        return levels[rung]
