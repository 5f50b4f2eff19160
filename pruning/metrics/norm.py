"""Norm: the length of the stream that a layer leaves.

Men et al., arXiv 2403.03853, compare with it: the longer the stream, the less one layer changes
its direction. In most models it grows with depth, so that the order is nearly
:class:`pruning.metrics.position.ReverseOrder`.
"""

from __future__ import annotations

from pruning.depths import removal_order
from pruning.metrics.base import Evidence, Need, Ranking, needed_dense_pass
from pruning.metrics.names import NORM


class Norm:
    """Ranks by the norm of each layer's output: the layer with the longest goes first.

    The score is the mean norm, negated, so that a low score goes first here as well.
    """

    name = NORM
    need = Need.DENSE_PASS

    def rank(self, evidence: Evidence) -> Ranking:
        scores = tuple(-norm for norm in needed_dense_pass(self, evidence).norm.means)
        return Ranking(removal_order(scores), scores)
