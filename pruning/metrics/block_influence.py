"""Block influence as a metric; :mod:`pruning.importance` defines and measures it."""

from __future__ import annotations

from pruning.depths import removal_order
from pruning.metrics.base import Evidence, Need, Ranking, needed_dense_pass
from pruning.metrics.names import BLOCK_INFLUENCE


class BlockInfluenceMetric:
    """Ranks by block influence (arXiv 2403.03853, equation 1)."""

    name = BLOCK_INFLUENCE
    need = Need.DENSE_PASS

    def rank(self, evidence: Evidence) -> Ranking:
        scores = needed_dense_pass(self, evidence).block_influence.scores
        return Ranking(removal_order(scores), scores)
