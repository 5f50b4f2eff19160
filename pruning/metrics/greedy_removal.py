"""Greedy KL: one layer after the other goes, each time the one whose absence costs least.

What a layer costs depends on what went before it, which no score of single layers knows. An old
cost is mostly too low, for what is left has more to do; so of the old costs only those near the
least have to be looked at again (Minoux, "Accelerated greedy algorithms for maximizing submodular
set functions", 1978). Where a cost falls, which happens, the choice is not always the least.
"""

from __future__ import annotations

from dataclasses import dataclass

from pruning.metrics.base import Evidence, Need, Ranking, needed_evaluator
from pruning.metrics.evaluator import BudgetSpent, Evaluate
from pruning.metrics.names import GREEDY_KL

# An evaluation runs the dense model once for all that it is asked together. As many costs as these
# have to be brought up to date for one removal in most models.
_LOOKED_AT_TOGETHER = 3


@dataclass(frozen=True, slots=True)
class GreedyRemoval:
    """Ranks by greedy removal; a layer's score is the loss without it and all before it.

    The evaluator repairs the skipped layers where they will be repaired when served: then the
    cost of a layer is what its repair leaves of it.

    ``max_removed`` is how many layers are searched for; None: half of them, for no model
    writes text with fewer. The others follow by their last known cost, as do all where the
    evaluator raises :class:`BudgetSpent`; their scores are sums of costs, not measured.
    """

    max_removed: int | None = None

    name = GREEDY_KL
    need = Need.LOSSES

    def rank(self, evidence: Evidence) -> Ranking:
        """Return the ranking.

        Raises :class:`BudgetSpent` where not even the layers alone could be evaluated, and
        :class:`ValueError` for more layers to remove than there are.
        """
        evaluate = needed_evaluator(self, evidence)
        num_layers = evidence.num_layers
        limit = num_layers // 2 if self.max_removed is None else self.max_removed
        if not 0 <= limit <= num_layers:
            raise ValueError(f"max_removed: got {limit}, allowed: 0 to {num_layers}")
        # First: even a search that is interrupted has looked at every layer.
        [loss, *alone] = evaluate([(), *((layer,) for layer in range(num_layers))])
        costs = {layer: without - loss for layer, without in enumerate(alone)}
        order: list[int] = []
        scores = [0.0] * num_layers
        try:
            while len(order) < limit:
                layer = _cheapest(evaluate, order, costs, loss)
                loss += costs.pop(layer)
                scores[layer] = loss
                order.append(layer)
        except BudgetSpent:
            pass
        for layer in sorted(costs, key=lambda layer: (costs[layer], -layer)):
            loss += max(costs[layer], 0.0)
            scores[layer] = loss
            order.append(layer)
        return Ranking(tuple(order), tuple(scores))


def _cheapest(evaluate: Evaluate, removed: list[int], costs: dict[int, float], loss: float) -> int:
    """Return the layer that costs least beside ``removed``, whose loss is ``loss``.

    Brings up to date the ``costs`` that it looks at.
    """
    current = set() if removed else set(costs)
    while True:
        cheapest = sorted(costs, key=lambda layer: (costs[layer], -layer))
        if cheapest[0] in current:
            return cheapest[0]
        stale = [layer for layer in cheapest if layer not in current][:_LOOKED_AT_TOGETHER]
        found = evaluate([tuple(sorted([*removed, layer])) for layer in stale])
        costs |= {layer: without - loss for layer, without in zip(stale, found, strict=True)}
        current.update(stale)
