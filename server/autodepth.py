"""Turns depth down as load rises, and up as it falls, for requests that allow it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from server.auto_rules import AutoRules, ladder, speedup
from server.depth_controller import DepthController, Load
from server.latency_window import LatencyWindow
from server.levels import Level
from server.policy import DepthPolicy

logger = logging.getLogger(__name__)

# Of what was measured, the last seconds count.
_WINDOW_SECONDS = 3.0


class AutoDepth:
    """Measures latencies, and chooses the level of requests that leave it to the server."""

    def __init__(self, rules: AutoRules, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_tokens = LatencyWindow(_WINDOW_SECONDS)
        self._gaps = LatencyWindow(_WINDOW_SECONDS)
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

    def observe(self, seconds: float, num_tokens: int | None) -> None:
        """Count the time of a step since a request's step before, which brought so many tokens;
        or, without a number, that of its first since it came.
        """
        if num_tokens is None:
            self._first_tokens.add(self._clock(), seconds)
        else:
            self._gaps.add(self._clock(), seconds, num_tokens)

    def choose(self, policy: DepthPolicy, longest_wait: float, utilization: float) -> Level:
        """Return the level for now.

        ``longest_wait`` is that of the requests that have not started, in seconds.
        """
        now = self._clock()
        levels = ladder(policy, self._rules)
        load = Load(
            # Whoever still waits will wait longer than that.
            time_to_first_token=max(self._first_tokens.mean(now), longest_wait),
            inter_token_latency=self._gaps.mean(now),
            utilization=utilization,
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
