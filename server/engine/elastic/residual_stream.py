"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from server.engine.elastic.stand_ins import StandIn, repair
from server.engine.elastic.step import ActiveTokens, RepairedTokens, Whole

Parts = tuple[torch.Tensor, torch.Tensor]
# (layers, positions [num_tokens], hidden, residual) -> (hidden, residual), each
# [num_tokens, hidden_size], after all of the layers
RunLayers = Callable[[Sequence[Any], torch.Tensor, torch.Tensor, torch.Tensor], Parts]


class Repair(NamedTuple):
    """A stand-in of layers, and the tokens for which it does their work."""

    stand_in: StandIn
    tokens: RepairedTokens


class ResidualStream:
    """The stream of all tokens of a step, from which layers are given their active ones.

    The stream is ``hidden + residual``, as vLLM's layers keep it; both are
    [num_tokens, hidden_size].

    Layers are not run one at a time: those in a row with the same active tokens are collected,
    and run together as soon as a layer has other active tokens or the stream is asked for. So
    the tokens of a subset are gathered and scattered once for all of these layers. Stand-ins are
    collected meanwhile. No token that they repair is active in the layers that are collected, so
    it does not matter which of the two is first.
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
        self._repairs: list[tuple[RepairedTokens, list[StandIn]]] = []

    def add(self, layer: Any, active: ActiveTokens, repairs: Sequence[Repair] = ()) -> None:
        """Run ``layer`` on its active tokens, at the latest when the stream is asked for.

        ``repairs`` do the work of layers for others.
        """
        if active is Whole.NONE:
            if repairs:  # perhaps of tokens that are active in the layers that are collected
                if self._layers:
                    self._run_collected()
                self._active = active
        else:
            if not _are_same(active, self._active):
                self._run_collected()
                self._active = active
            self._layers.append(layer)
        for stand_in, tokens in repairs:
            if not (self._repairs and _are_same(tokens, self._repairs[-1][0])):
                self._repairs.append((tokens, []))
            self._repairs[-1][1].append(stand_in)

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
        repairs, self._repairs = self._repairs, []
        for tokens, stand_ins in repairs:
            self._change(tokens, partial(_repair, tuple(stand_ins)))

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


def _are_same(tokens: ActiveTokens | RepairedTokens, others: ActiveTokens | RepairedTokens) -> bool:
    if isinstance(tokens, Whole) or isinstance(others, Whole):
        return tokens is others
    return tokens.key == others.key


def _repair(
    stand_ins: Sequence[StandIn],
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
) -> Parts:
    return repair(stand_ins, hidden, residual)
