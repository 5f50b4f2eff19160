"""One load, and requests of two kinds that bear different depths."""

from __future__ import annotations

from server.depth.auto_rules import AutoRules
from server.depth.autodepth import AutoDepth, PresentLevels
from server.depth.policy import DepthPolicy
from tests.server.depth.test_auto_rules import policy, probes

# Depth 6 does for both kinds of request, depth 4 for Score alone, depth 2 for neither.
POLICY = policy(
    {
        8: probes(),
        6: probes(),
        4: probes(ratio=3.0),
        2: probes(ratio=9.0, accuracy=0.3),
    }
)
RULES = AutoRules(max_writing_loss=0.5, max_repetition=0.2, max_choosing_loss=0.1, hold_seconds=5.0)


class Load:
    """Automatic depth under a load that is set by hand."""

    def __init__(self, policy: DepthPolicy = POLICY) -> None:
        self.now = 100.0
        self.auto = AutoDepth(RULES, clock=lambda: self.now)
        self.policy = policy

    def after(self, seconds: float, *, wait: float, scores: bool) -> tuple[int, int]:
        """Return the depths of both kinds when the longest wait was ``wait`` all the time."""
        present: PresentLevels | None = None
        for _ in range(int(seconds / 0.5)):
            self.now += 0.5
            if scores:
                self.auto.observe_score()
            present = self.auto.choose(
                self.policy, num_waiting=0, longest_wait=wait, utilization=0.1
            )
        assert present is not None
        return present.generate.decode_layers, present.score.decode_layers


def test_each_kind_goes_as_far_as_it_may() -> None:
    load = Load()
    assert load.after(0.5, wait=0.0, scores=True) == (8, 8)
    assert load.after(0.5, wait=9.0, scores=True) == (6, 6)
    assert load.after(5, wait=9.0, scores=True) == (6, 4)
    assert load.after(5, wait=9.0, scores=True) == (6, 4)
    assert load.auto.rung == 2
    assert load.after(20, wait=0.0, scores=True) == (8, 8)


def test_without_scores_their_levels_are_no_rungs() -> None:
    load = Load()
    assert load.after(10, wait=9.0, scores=False) == (6, 6)
    assert load.auto.rung == 1
    # The first ones bring them back.
    assert load.after(5, wait=9.0, scores=True) == (6, 4)
    assert load.auto.rung == 2
    # Long after the last, generation need not climb through them.
    assert load.after(70, wait=9.0, scores=False) == (6, 6)
    assert load.auto.rung == 1


def test_other_levels_begin_without_load() -> None:
    load = Load()
    assert load.after(10, wait=9.0, scores=True) == (6, 4)
    load.policy = POLICY.with_levels(POLICY.levels[:1], None)
    assert load.after(10, wait=9.0, scores=True) == (8, 8)
    assert load.auto.rung == 0
