"""Orders that know no more of a layer than where it is; arXiv 2403.03853 compares with both."""

from __future__ import annotations

from pruning.depths import removal_order
from pruning.metrics.base import Evidence, Need, Ranking
from pruning.metrics.names import REVERSE_ORDER, SEQUENTIAL


class Sequential:
    """Ranks by the layer's number: the first goes first."""

    name = SEQUENTIAL
    need = Need.NOTHING

    def rank(self, evidence: Evidence) -> Ranking:
        scores = tuple(map(float, range(evidence.num_layers)))
        return Ranking(removal_order(scores), scores)


class ReverseOrder:
    """Ranks by the number of layers that follow: the last goes first."""

    name = REVERSE_ORDER
    need = Need.NOTHING

    def rank(self, evidence: Evidence) -> Ranking:
        scores = tuple(map(float, reversed(range(evidence.num_layers))))
        return Ranking(removal_order(scores), scores)
