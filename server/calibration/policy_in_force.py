"""The depth policy in force."""

from __future__ import annotations

import logging
from collections.abc import Callable

from server.depth.level_search import problem_of, search_levels
from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class PolicyInForce:
    """Holds the policy that requests are served under, and shows it in the metrics.

    There is none until the first is installed. Belongs to the thread of the event loop.
    """

    def __init__(
        self, metrics: Metrics, on_install: Callable[[DepthPolicy], None] = lambda _: None
    ) -> None:
        """``on_install`` is called with each policy before it is in force."""
        self._metrics = metrics
        self._on_install = on_install
        self._policy: DepthPolicy | None = None
        self._repair = RepairStatus()
        # What is to be said about levels that no depth is good enough for.
        self.problems: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether a policy has been installed."""
        return self._policy is not None

    @property
    def policy(self) -> DepthPolicy:
        assert self._policy is not None, "no policy has been installed"
        return self._policy

    @property
    def repair(self) -> RepairStatus:
        """What stands in for the layers that the policy skips, and why not what is wanted."""
        return self._repair

    def set_repair(self, status: RepairStatus) -> None:
        """Show what stands in for the layers that the policy in force skips."""
        self._repair = status
        self._metrics.set_repair(status)

    def install(self, policy: DepthPolicy) -> None:
        """Serve the requests that start from now on under ``policy``."""
        self._on_install(policy)
        self._policy = policy
        before, self.problems = self.problems, tuple(map(problem_of, search_levels(policy).unmet))
        for problem in self.problems:
            if problem not in before:
                logger.warning("%s", problem)
        self._metrics.set_policy(policy)
