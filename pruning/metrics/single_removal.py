"""Single-removal KL: how far the model without one layer is from the whole one.

Kim et al., "Shortened LLaMA", arXiv 2402.02834, rank by the perplexity without one layer; the
divergence from the dense model needs fewer tokens for the same certainty.
"""

from __future__ import annotations

from pruning.depths import removal_order
from pruning.metrics.base import Evidence, Need, Ranking, needed_evaluator
from pruning.metrics.names import SINGLE_REMOVAL_KL


class SingleRemoval:
    """Ranks by the loss without each layer alone, in nats a token."""

    name = SINGLE_REMOVAL_KL
    need = Need.LOSSES

    def rank(self, evidence: Evidence) -> Ranking:
        evaluate = needed_evaluator(self, evidence)
        scores = tuple(evaluate([(layer,) for layer in range(evidence.num_layers)]))
        return Ranking(removal_order(scores), scores)
