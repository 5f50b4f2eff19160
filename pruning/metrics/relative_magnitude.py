"""Relative magnitude: how large what a layer adds is beside what it leaves.

Samragh et al., "Weight subcloning: direct initialization of transformers using larger pretrained
ones", arXiv 2312.09299: ||f(x)|| / ||x + f(x)||, averaged over tokens, where a layer turns x into
x + f(x).
"""

from __future__ import annotations

from pruning.depths import removal_order
from pruning.metrics.base import Evidence, Need, Ranking, needed_dense_pass
from pruning.metrics.names import RELATIVE_MAGNITUDE


class RelativeMagnitude:
    """Ranks by relative magnitude: the layer that adds least goes first."""

    name = RELATIVE_MAGNITUDE
    need = Need.DENSE_PASS

    def rank(self, evidence: Evidence) -> Ranking:
        scores = needed_dense_pass(self, evidence).relative_magnitude.means
        return Ranking(removal_order(scores), scores)
