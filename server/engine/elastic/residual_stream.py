"""The residual stream of one step while its tokens run different layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple

import torch

from server.engine.elastic.stand_ins import StandIn, repair
from server.engine.elastic.step import ActiveTokens, RepairedTokens, Whole

Parts = tuple[torch.Tensor, torch.Tensor]
# (layers, positions [num_tokens], hidden, residual) -> (hidden, residual), each
# [num_tokens, hidden_size], after all of the layers
RunLayers = Callable[[Sequence[Any], torch.Tensor, torch.Tensor, torch.Tensor], Parts]


class Repair(NamedTuple):
    """A stand-in of a layer, and the tokens for which it does the layer's work."""

    stand_in: StandIn
    tokens: RepairedTokens


class ResidualStream:
    """The stream of all tokens of a step, from which layers are given their active ones.

    The stream is ``hidden + residual``, as vLLM's layers keep it; both are
    [num_tokens, hidden_size].

    Layers are not run one at a time: those in a row with the same active tokens are collected,
    and run together as soon as a layer has other active tokens or the stream is asked for. So
    the tokens of a subset are gathered and scattered once for all of these layers. The same holds
    for stand-ins and the tokens that they repair. No token is active and repaired in one layer, or
    repaired twice, so the order does not matter.
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
        self._repaired: list[RepairedTokens] = []
        # Those to apply to each of these tokens.
        self._stand_ins: list[list[StandIn]] = []

    def add(self, layer: Any, active: ActiveTokens, repairs: Sequence[Repair] = ()) -> None:
        """Run ``layer`` on its active tokens, at the latest when the stream is asked for.

        ``repairs`` do its work for others.
        """
        if not (self._fits(active) and self._fit(repairs)):
            self._run_collected()
            self._active, self._repaired = active, [one.tokens for one in repairs]
            self._stand_ins = [[] for _ in repairs]
        if active is not Whole.NONE:
            self._layers.append(layer)
        for stand_ins, added in zip(self._stand_ins, repairs, strict=False):
            stand_ins.append(added.stand_in)

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
        for tokens, stand_ins in zip(self._repaired, self._stand_ins, strict=True):
            if stand_ins:
                self._change(tokens, partial(_repair, tuple(stand_ins)))
                stand_ins.clear()

    def _fits(self, active: ActiveTokens) -> bool:
        """Return whether these are no tokens, or the active ones that work is collected for."""
        return active is Whole.NONE or _are_same(active, self._active)

    def _fit(self, repairs: Sequence[Repair]) -> bool:
        """Return whether there are none, or they are for the tokens that work is collected for."""
        return not repairs or (
            len(repairs) == len(self._repaired)
            and all(
                starmap(_are_same, zip((r.tokens for r in repairs), self._repaired, strict=True))
            )
        )

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
