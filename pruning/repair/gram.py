"""The sums over tokens from which a layer's map is fitted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Memory that the sums of a group of layers may take, those of the held-out tokens included.
_GROUP_BYTES = 1 << 30
_BYTES_PER_ELEMENT = 2 * 2 * 8


def layers_at_a_time(hidden_size: int) -> int:
    """Return how many layers are measured in one pass over the text, so that 1 GiB is enough.

    At least one, which takes 2 GiB where ``hidden_size`` is 8192.
    """
    return max(1, _GROUP_BYTES // (_BYTES_PER_ELEMENT * hidden_size**2))


@dataclass(slots=True)
class LayerGram:
    """The sums of one layer: X the stream before it, D what it adds, [num_tokens, hidden] each.

    ``gram`` is X^T X and ``cross`` X^T D, float64 [hidden, hidden]; ``energy`` is the sum of the
    squares of D, float64 [].
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    num_tokens: int


class GramEstimator:
    """Accumulates the sums of some layers over any number of tokens.

    Takes 16 x hidden^2 bytes for each layer, 268 MB where hidden is 4096: where memory is short,
    the layers are taken in groups, with a pass over the text for each.
    """

    def __init__(self, layers: Collection[int]) -> None:
        self._layers = frozenset(layers)
        self._sums: dict[int, LayerGram] = {}

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the tokens of one forward pass of ``layer``, unless it is none of the group.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only. Products are computed and summed in float64:
        the streams of language models have a few directions a thousand times as long as the
        others, and squared they leave nothing of those in float32. Nothing waits for the
        device.
        """
        import torch

        if layer not in self._layers:
            return
        if before.ndim != 2 or before.shape != after.shape:
            raise ValueError(
                f"before, after: got shapes {list(before.shape)} and {list(after.shape)}, "
                "allowed: equal shapes [num_tokens, hidden]"
            )
        with torch.no_grad():
            x = before.double()
            added = after.double() - x
            sums = LayerGram(x.mT @ x, x.mT @ added, added.square().sum(), len(x))
            previous = self._sums.get(layer)
            if previous is not None:
                # Not in place: a tensor made under inference_mode could not be changed outside.
                sums.gram = previous.gram + sums.gram
                sums.cross = previous.cross + sums.cross
                sums.energy = previous.energy + sums.energy
                sums.num_tokens += previous.num_tokens
        self._sums[layer] = sums

    def take(self, layer: int) -> LayerGram | None:
        """Return the sums of ``layer`` and forget them; None where it has seen no tokens."""
        return self._sums.pop(layer, None)
