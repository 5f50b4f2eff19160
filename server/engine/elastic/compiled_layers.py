"""Decoder layers compiled once, for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from server.engine.elastic.shared_code import SharedCode

# Any number above one makes the compiler take the number of tokens for a variable.
_NUM_EXAMPLE_TOKENS = 16

Parts = tuple[torch.Tensor, torch.Tensor]


class CompiledLayers:
    """Runs the layers of one model and its last norm, through compiled code where there is some.

    One piece of code serves every layer that differs from the others in nothing but weights, so
    any choice of layers runs compiled. Until :meth:`compile` has been called, everything runs as
    it is.
    """

    def __init__(self) -> None:
        self._layer_code: SharedCode | None = None
        self._norm_code: SharedCode | None = None

    def compile(
        self, layers: Sequence[nn.Module], norm: nn.Module, hidden_size: int, dtype: torch.dtype
    ) -> int:
        """Compile and return how many layers are built alike.

        Must be called under a forward context without attention metadata. Raises what
        torch.compile raises, for example where there is no C++ compiler; layers go on running
        as they are then.
        """
        device = next(layers[0].parameters()).device
        positions = torch.arange(_NUM_EXAMPLE_TOKENS, device=device)
        hidden, residual = (
            torch.zeros(_NUM_EXAMPLE_TOKENS, hidden_size, dtype=dtype, device=device)
            for _ in range(2)
        )
        layer_code = SharedCode(_run_layer, layers, (positions, hidden, residual))
        self._norm_code = SharedCode(_run_norm, [norm], (hidden, residual))
        self._layer_code = layer_code
        return len(layer_code)

    def run(
        self,
        layers: Sequence[nn.Module],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
    ) -> Parts:
        """Run ``layers`` one after another; see :data:`residual_stream.RunLayers`."""
        code = self._layer_code
        for layer in layers:
            run = _run_layer if code is None or layer not in code else code
            hidden, residual = run(layer, positions, hidden, residual)
        return hidden, residual

    def normalize(
        self, norm: nn.Module, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Return what the norm makes of the stream, [num_tokens, hidden_size]."""
        run = _run_norm if self._norm_code is None else self._norm_code
        return run(norm, hidden, residual)[0]


def _run_layer(layer: Any, positions: torch.Tensor, hidden: Any, residual: Any) -> Parts:
    hidden, residual = layer(positions, hidden, residual)
    return hidden, residual


def _run_norm(norm: Any, hidden: torch.Tensor, residual: torch.Tensor) -> Parts:
    hidden, residual = norm(hidden, residual)
    return hidden, residual
