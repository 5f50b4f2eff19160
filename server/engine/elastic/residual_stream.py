"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.engine.elastic.attention import Runners, TokenSubset

# (positions [num_tokens], hidden, residual) -> (hidden, residual), each [num_tokens, hidden_size]
LayerCall = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]


class ResidualStream:
    """Holds the step's tokens and lends layers those that run them.

    The stream is ``hidden + residual``, as vLLM's layers keep it, or ``hidden`` alone before the
    first layer has run. A subset stays gathered until other tokens are asked for: layers that
    are pruned together lie together, so most of them need no copy.
    """

    def __init__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        self._positions = positions
        self._hidden = hidden
        self._residual = residual
        self._tokens: torch.Tensor | None = None
        self._subset_positions: torch.Tensor | None = None
        self._subset_hidden: torch.Tensor | None = None
        self._subset_residual: torch.Tensor | None = None

    def run(self, runners: Runners | TokenSubset, layer: LayerCall) -> None:
        """Run ``layer`` on the tokens that run it."""
        if runners is Runners.NONE:
            return
        if isinstance(runners, TokenSubset):
            self._gather(runners.tokens)
            assert self._subset_positions is not None and self._subset_hidden is not None
            self._subset_hidden, self._subset_residual = layer(
                self._subset_positions, self._subset_hidden, self._subset_residual
            )
        else:
            self._scatter()
            self._hidden, self._residual = layer(self._positions, self._hidden, self._residual)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ``(hidden, residual)`` of all tokens; a layer may overwrite them."""
        self._scatter()
        return self._hidden, self._residual

    def total(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return a copy of the stream of some tokens, [num_tokens, hidden_size]."""
        hidden, residual = self.parts()
        return hidden[tokens] if residual is None else hidden[tokens] + residual[tokens]

    def _gather(self, tokens: torch.Tensor) -> None:
        if self._tokens is tokens:
            return
        self._scatter()
        if self._residual is None:
            self._residual = torch.zeros_like(self._hidden)
        self._tokens = tokens
        self._subset_positions = self._positions[tokens]
        self._subset_hidden = self._hidden[tokens]
        self._subset_residual = self._residual[tokens]

    def _scatter(self) -> None:
        if self._tokens is None:
            return
        assert self._subset_hidden is not None and self._subset_residual is not None
        assert self._residual is not None
        self._hidden.index_copy_(0, self._tokens, self._subset_hidden)
        self._residual.index_copy_(0, self._tokens, self._subset_residual)
        self._tokens = None
