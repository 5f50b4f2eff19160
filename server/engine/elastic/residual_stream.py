"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from server.engine.elastic.step import ActiveTokens, TokenSubset, Whole

# (layers, positions [num_tokens], hidden, residual) -> (hidden, residual), each
# [num_tokens, hidden_size], after all of the layers
RunLayers = Callable[
    [Sequence[Any], torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


class ResidualStream:
    """The stream of all tokens of a step, from which layers are given their active ones.

    The stream is ``hidden + residual``, as vLLM's layers keep it; both are
    [num_tokens, hidden_size].

    Layers are not run one at a time: those in a row with the same active tokens are collected,
    and run together as soon as a layer has other active tokens or the stream is asked for. So
    the tokens of a subset are gathered and scattered once for all of these layers.
    """

    def __init__(
        self,
        run_layers: RunLayers,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        self._run_layers = run_layers
        self._positions = positions
        self._hidden = hidden
        self._residual = residual
        self._collected: list[Any] = []
        # The active tokens of the collected layers; None: all tokens of the step.
        self._subset: TokenSubset | None = None

    def add(self, layer: Any, active: ActiveTokens) -> None:
        """Run ``layer`` on its active tokens, at the latest when the stream is asked for."""
        if active is Whole.NONE:
            return
        subset = active if isinstance(active, TokenSubset) else None
        if not _same_tokens(subset, self._subset):
            self._run_collected()
            self._subset = subset
        self._collected.append(layer)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(hidden, residual)`` of all tokens; the caller may overwrite them."""
        self._run_collected()
        return self._hidden, self._residual

    def total(self, tokens: torch.Tensor | slice) -> torch.Tensor:
        """Return a copy of the stream of some tokens, [num_tokens, hidden_size]."""
        hidden, residual = self.parts()
        return hidden[tokens] + residual[tokens]

    def _run_collected(self) -> None:
        if not self._collected:
            return
        layers, self._collected = self._collected, []
        if self._subset is None:
            self._hidden, self._residual = self._run_layers(
                layers, self._positions, self._hidden, self._residual
            )
            return
        tokens = self._subset.tokens
        hidden, residual = self._run_layers(
            layers, self._positions[tokens], self._hidden[tokens], self._residual[tokens]
        )
        self._hidden.index_copy_(0, tokens, hidden)
        self._residual.index_copy_(0, tokens, residual)


def _same_tokens(one: TokenSubset | None, other: TokenSubset | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.key == other.key
