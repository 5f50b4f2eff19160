"""Means, for each layer, of a quantity that every token gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ImportanceError(ValueError):
    """What was measured of a layer is not fit to rank it."""


@dataclass(frozen=True, slots=True)
class LayerMeans:
    """The mean of a quantity at each layer, with its standard error, over ``num_tokens`` tokens.

    The standard errors treat the tokens as independent. Tokens of one text are not quite, so
    read them as lower bounds.
    """

    means: tuple[float, ...]
    stderrs: tuple[float, ...]
    num_tokens: int


class LayerMeanEstimator(ABC):
    """Accumulates a quantity of every layer over any number of tokens in constant memory.

    With more ``num_quantities``, each of them; then their sums follow each other.
    """

    num_quantities = 1

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, allowed: at least 1")
        self._num_tokens = [0] * num_layers
        # Of each layer, on the device of its states: sum and sum of squares of each quantity,
        # float64 [2 * num_quantities].
        self._moments: list[torch.Tensor | None] = [None] * num_layers

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the tokens of one forward pass of ``layer``.

        ``before`` and ``after`` are the residual stream as the layer receives and leaves it,
        [num_tokens, hidden], valid tokens only. The quantity is computed in float32, in float64
        where the states are float64, and summed in float64. Nothing waits for the device.
        """
        import torch

        if not 0 <= layer < len(self._num_tokens):
            raise ValueError(f"layer: got {layer}, allowed: 0 to {len(self._num_tokens) - 1}")
        if before.ndim != 2 or before.shape != after.shape:
            raise ValueError(
                f"before, after: got shapes {list(before.shape)} and {list(after.shape)}, "
                "allowed: equal shapes [num_tokens, hidden]"
            )
        with torch.no_grad():
            dtype = torch.promote_types(before.dtype, torch.float32)
            values = self.of_tokens(before.to(dtype), after.to(dtype)).double()
            moments = torch.stack([values.sum(-1), values.square().sum(-1)], dim=-1).flatten()
            previous = self._moments[layer]
            # Not in place: a tensor made under inference_mode could not be changed outside it.
            self._moments[layer] = moments if previous is None else previous + moments
        self._num_tokens[layer] += before.shape[0]

    @abstractmethod
    def of_tokens(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return the quantity of each token, [num_tokens], of states [num_tokens, hidden].

        With more ``num_quantities`` than one, [num_quantities, num_tokens].
        """

    def sums(self) -> list[list[float]]:
        """Return, for each layer, the number of tokens and the sums of values and squares.

        Plain lists, to be sent between processes, merged with :func:`merge_sums` and turned
        into means with :func:`layer_means`. Waits for the device.
        """
        nothing = (0.0,) * (2 * self.num_quantities)
        return [
            [float(n), *(moments.tolist() if moments is not None else nothing)]
            for n, moments in zip(self._num_tokens, self._moments, strict=True)
        ]


def merge_sums(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the sums over the tokens of ``a`` and ``b`` together; they must be distinct tokens."""
    if len(a) != len(b):
        raise ValueError(f"sums: got {len(a)} and {len(b)} layers, allowed: equally many")
    return [
        [x + y for x, y in zip(of_a, of_b, strict=True)] for of_a, of_b in zip(a, b, strict=True)
    ]


def layer_means(sums: Sequence[Sequence[float]], quantity: str) -> LayerMeans:
    """Turn the sums of a :class:`LayerMeanEstimator` into means and standard errors.

    ``quantity`` names in errors what was measured. Raises :class:`ImportanceError`, naming the
    layer, where a sum is not finite (a state was NaN, infinite or a zero vector), where fewer
    than two tokens were measured, and where the layers saw different numbers of tokens.
    """
    if not sums:
        raise ImportanceError("no layers were measured")
    means, stderrs = [], []
    for layer, (n, total, squares) in enumerate(sums):
        if n < 2:
            raise ImportanceError(f"layer {layer}: measured on {n:.0f} tokens, allowed: 2 or more")
        if not (math.isfinite(total) and math.isfinite(squares)):
            raise ImportanceError(
                f"layer {layer}: the {quantity} is not finite: among the states of "
                f"{n:.0f} tokens is a NaN, an infinity or a zero vector"
            )
        if n != sums[0][0]:
            raise ImportanceError(
                f"layer {layer}: measured on {n:.0f} tokens, but layer 0 on {sums[0][0]:.0f}"
            )
        mean = total / n
        # Rounding may leave the variance of equal values just below zero.
        variance = max(squares - total * mean, 0.0) / (n - 1)
        means.append(mean)
        stderrs.append(math.sqrt(variance / n))
    return LayerMeans(tuple(means), tuple(stderrs), int(sums[0][0]))
