"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from server.engine.elastic.attention import Runners, TokenSubset

# (layers, positions [num_tokens], hidden, residual) -> (hidden, residual), each
# [num_tokens, hidden_size], after all of the layers
RunLayers = Callable[
    [Sequence[Any], torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


class ResidualStream:
    """Holds the step's tokens and lends layers those that run them.

    The stream is ``hidden + residual``, as vLLM's layers keep it. Layers wait until other tokens
    are asked for or the stream is: then those that the same tokens run are run together. Layers
    that are pruned together lie together, so a subset is rarely gathered twice.
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
        self._waiting: list[Any] = []
        # None: every token of the step
        self._subset: TokenSubset | None = None

    def run(self, runners: Runners | TokenSubset, layer: Any) -> None:
        """Run ``layer`` on the tokens that run it, at the latest when the stream is asked for."""
        if runners is Runners.NONE:
            return
        subset = runners if isinstance(runners, TokenSubset) else None
        if not _same_tokens(subset, self._subset):
            self._catch_up()
            self._subset = subset
        self._waiting.append(layer)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(hidden, residual)`` of all tokens; the caller may overwrite them."""
        self._catch_up()
        return self._hidden, self._residual

    def total(self, tokens: torch.Tensor | slice) -> torch.Tensor:
        """Return a copy of the stream of some tokens, [num_tokens, hidden_size]."""
        hidden, residual = self.parts()
        return hidden[tokens] + residual[tokens]

    def _catch_up(self) -> None:
        if not self._waiting:
            return
        layers, self._waiting = self._waiting, []
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
