"""Turns depth down as load rises, and up as it falls, for requests that allow it."""

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

_WINDOW_SECONDS = 2.0
# To tell how fast requests start.
_NUM_STARTS_NEEDED = 8


class AutoDepth:
    """Measures latencies, and chooses the level of requests that leave it to the server."""

    def __init__(self, rules: AutoRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_tokens = SlidingWindow(_WINDOW_SECONDS)
        self._gaps = SlidingWindow(_WINDOW_SECONDS)
        self._arrivals = SlidingWindow(_WINDOW_SECONDS)
        self.set_rules(rules)

    @property
    def rung(self) -> int:
        """How many levels the depth has been turned down."""
        return self._controller.rung

    @property
    def rules(self) -> AutoRules:
        return self._rules

    def set_rules(self, rules: AutoRules) -> None:
        """Go by these rules, beginning without load."""
        self._rules = rules
        self._controller = DepthController(rules.targets, rules.hold_seconds)

    def observe_arrival(self) -> None:
        """Count a request that came."""
        self._arrivals.add(self._clock(), 0.0)

    def observe(self, seconds: float, num_tokens: int | None) -> None:
        """Count the time of a step since a request's step before, which brought so many tokens;
        or, without a number, that of its first since it came.
        """
        if num_tokens is None:
            self._first_tokens.add(self._clock(), seconds)
        else:
            self._gaps.add(self._clock(), seconds, num_tokens)

    def choose(
        self, policy: DepthPolicy, *, num_waiting: int, longest_wait: float, utilization: float
    ) -> Level:
        """Return the level for now.

        ``num_waiting`` requests have not started, of which one has waited ``longest_wait``
        seconds.
        """
        now = self._clock()
        levels = ladder(policy, self._rules)
        num_arrivals, num_starts = self._arrivals.count(now), self._first_tokens.count(now)
        # Whoever still waits will wait longer than that, and whoever comes now as long as all
        # that wait take to start.
        first_token = max(self._first_tokens.mean(now), longest_wait)
        overload = 1.0
        if num_waiting and num_starts >= _NUM_STARTS_NEEDED:
            first_token = max(first_token, num_waiting * _WINDOW_SECONDS / num_starts)
            overload = max(1.0, num_arrivals / num_starts)
        load = Load(
            time_to_first_token=first_token,
            inter_token_latency=self._gaps.mean(now),
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
