"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from server.engine.elastic.stand_ins import StandIn, repair
from server.engine.elastic.step import ActiveTokens, RepairedTokens, Whole

Parts = tuple[torch.Tensor, torch.Tensor]
# (layers, positions [num_tokens], hidden, residual) -> (hidden, residual), each
# [num_tokens, hidden_size], after all of the layers
RunLayers = Callable[[Sequence[Any], torch.Tensor, torch.Tensor, torch.Tensor], Parts]


class ResidualStream:
    """The stream of all tokens of a step, from which layers are given their active ones.

    The stream is ``hidden + residual``, as vLLM's layers keep it; both are
    [num_tokens, hidden_size].

    Layers are not run one at a time: those in a row with the same active tokens are collected,
    and run together as soon as a layer has other active tokens or the stream is asked for. So
    the tokens of a subset are gathered and scattered once for all of these layers. The same holds
    for stand-ins and the tokens that they repair. No token is active and repaired in one layer,
    so the order of the two does not matter.
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
        self._layers: list[Any] = []
        self._active: ActiveTokens = Whole.NONE
        self._stand_ins: list[StandIn] = []
        self._repaired: RepairedTokens = Whole.NONE

    def add(
        self,
        layer: Any,
        active: ActiveTokens,
        stand_in: StandIn | None = None,
        repaired: RepairedTokens = Whole.NONE,
    ) -> None:
        """Run ``layer`` on its active tokens, at the latest when the stream is asked for.

        ``stand_in`` does its work for those that are ``repaired``.
        """
        if not (_fits(active, self._active) and _fits(repaired, self._repaired)):
            self._run_collected()
            self._active, self._repaired = active, repaired
        if active is not Whole.NONE:
            self._layers.append(layer)
        if repaired is not Whole.NONE:
            assert stand_in is not None
            self._stand_ins.append(stand_in)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(hidden, residual)`` of all tokens; the caller may overwrite them."""
        self._run_collected()
        return self._hidden, self._residual

    def total(self, tokens: torch.Tensor | slice) -> torch.Tensor:
        """Return a copy of the stream of some tokens, [num_tokens, hidden_size]."""
        hidden, residual = self.parts()
        return hidden[tokens] + residual[tokens]

    def _run_collected(self) -> None:
        if self._layers:
            layers, self._layers = self._layers, []
            self._change(self._active, lambda *parts: self._run_layers(layers, *parts))
        if self._stand_ins:
            stand_ins, self._stand_ins = self._stand_ins, []
            self._change(self._repaired, lambda _, *parts: repair(stand_ins, *parts))

    def _change(
        self,
        tokens: ActiveTokens | RepairedTokens,
        run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Parts],
    ) -> None:
        if isinstance(tokens, Whole):
            assert tokens is Whole.ALL
            self._hidden, self._residual = run(self._positions, self._hidden, self._residual)
            return
        indices = tokens.tokens
        hidden, residual = run(
            self._positions[indices], self._hidden[indices], self._residual[indices]
        )
        self._hidden.index_copy_(0, indices, hidden)
        self._residual.index_copy_(0, indices, residual)


def _fits(tokens: ActiveTokens | RepairedTokens, collected: ActiveTokens | RepairedTokens) -> bool:
    """Return whether ``tokens`` are none, or the ones that work is collected for."""
    if isinstance(tokens, Whole) or isinstance(collected, Whole):
        return tokens is Whole.NONE or tokens is collected
    return tokens.key == collected.key
