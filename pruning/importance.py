"""Block Influence, the importance of a decoder layer.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
arXiv 2403.03853, equation 1: the influence of layer i is ::

    BI_i = 1 - E_t[cos(h_i[t], h_{i+1}[t])]

where h_i[t] is the residual stream of token t as layer i receives it and h_{i+1}[t] as it leaves
it, before any norm. A layer that barely turns the residual stream scores near 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.decoder import ForwardPasses, find_decoder, observed
from pruning.layer_means import ImportanceError, LayerMeanEstimator, layer_means, merge_sums

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "BlockInfluence",
    "BlockInfluenceEstimator",
    "ImportanceError",
    "block_influence",
    "measure_block_influence",
    "merge_sums",
]


@dataclass(frozen=True, slots=True)
class BlockInfluence:
    """The influence of each layer, with its standard error, over ``num_tokens`` tokens.

    The standard errors treat tokens as independent. Tokens of one text are not quite independent,
    so the standard errors are lower bounds.
    """

    scores: tuple[float, ...]
    stderrs: tuple[float, ...]
    num_tokens: int


class BlockInfluenceEstimator(LayerMeanEstimator):
    """Sums of the influence of every layer over any number of tokens, in constant memory."""

    def of_tokens(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        import torch

        cosines: torch.Tensor = torch.linalg.vecdot(_directions(before), _directions(after))
        return 1 - cosines.double()


def block_influence(sums: Sequence[Sequence[float]]) -> BlockInfluence:
    """Turn the sums of :class:`BlockInfluenceEstimator` into scores and standard errors.

    Raises :class:`ImportanceError` as :func:`pruning.layer_means.layer_means` does; a zero
    vector, which has no direction, is not finite.
    """
    measured = layer_means(sums, "block influence")
    return BlockInfluence(measured.means, measured.stderrs, measured.num_tokens)


def measure_block_influence(
    model: nn.Module,
    input_ids_batches: Iterable[torch.Tensor],
    attention_masks: Iterable[torch.Tensor] | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> BlockInfluence:
    """Measure the influence of the decoder layers of a transformers model.

    ``input_ids_batches`` are [batch, length]; ``attention_masks``, one for each batch and of
    its shape, are zero at padding, which is not counted. Batches for a model that ignores masks,
    such as RWKV, must be padded on the right. By default, ``layers`` are those that
    :func:`pruning.decoder.find_decoder` finds. The states are taken from the layers themselves
    and not from ``output_hidden_states``, whose last entry has gone through the final norm.

    Raises :class:`ValueError` for a model in training mode, where dropout would distort the
    states, and for one whose layers cannot be found; :class:`ImportanceError` as
    :func:`block_influence` does.
    """
    decoder = find_decoder(model, layers)
    passes = ForwardPasses(decoder)
    estimator = BlockInfluenceEstimator(len(decoder.layers))

    def observe(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        estimator.update(layer, passes.valid_tokens(before), passes.valid_tokens(after))

    with observed(decoder.layers, observe):
        passes.run(input_ids_batches, attention_masks)
    return block_influence(estimator.sums())


def _directions(states: torch.Tensor) -> torch.Tensor:
    import torch

    # A zero vector has no direction. With torch's cosine_similarity its cosine would be 0; here it
    # becomes NaN, which block_influence refuses.
    norms: torch.Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / norms
