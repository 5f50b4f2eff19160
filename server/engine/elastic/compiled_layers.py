"""Decoder layers compiled once, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from server.engine.elastic.shared_code import SharedCode

# Any number above one makes the compiler take the number of tokens for a variable.
_NUM_EXAMPLE_TOKENS = 16
# One, which the compiler takes to be impossible; an even number; an odd one beyond the width of
# the processor's vectors.
_COMPARED_TOKENS = 1, 2, 17
# How far a token's states may be from those of the layer itself, as part of their length. What
# is fused is rounded less often.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Rounding may send a token to another expert, but not every time; wrong code is always wrong.
_NUM_TRIES = 3

Parts = tuple[torch.Tensor, torch.Tensor]


class CompiledCodeDiffers(RuntimeError):
    """The compiled code of a layer or a norm computes something else than the module itself."""


class CompiledLayers:
    """Runs the layers of one model and its last norm, through compiled code where there is some.

    One piece of code serves every layer that differs from the others in nothing but weights, so
    any choice of layers runs compiled. Until :meth:`compile`, everything runs as it is.
    """

    def __init__(self) -> None:
        self._layer_code: SharedCode | None = None
        self._norm_code: SharedCode | None = None

    def compile(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        max_tokens: int,
        comparing: AbstractContextManager[object] | None = None,
    ) -> int:
        """Compile for steps of up to ``max_tokens``; return how many layers are built alike.

        Must be called under a forward context without attention metadata. Before the code is
        used, it is compared with the modules themselves; ``comparing``, entered for that, has to
        let attention give the same for the same queries, keys and values.

        Raises what :class:`SharedCode` and :meth:`LayerCode.compare` raise; everything goes on
        running as it is then.
        """
        code = LayerCode(layers, norm, hidden_size, dtype, max_tokens=max_tokens)
        with comparing or nullcontext():
            code.compare()
        self._layer_code, self._norm_code = code.layer, code.norm
        return len(code.layer)

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


class LayerCode:
    """Code compiled of a model's layers and its last norm."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        hidden_size: int,
        dtype: torch.dtype,
        *,
        max_tokens: int,
    ) -> None:
        """Compile for steps of up to ``max_tokens`` tokens; raise what :class:`SharedCode` does."""
        self._layers = layers
        self._norm_module = norm
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = next(layers[0].parameters()).device
        positions, hidden, residual = self._example(_NUM_EXAMPLE_TOKENS, seed=0)
        self.layer = SharedCode(
            _run_layer, layers, (positions, hidden, residual), max_size=max_tokens
        )
        _, hidden, residual = self._example(_NUM_EXAMPLE_TOKENS, seed=0)
        self.norm = SharedCode(_run_norm, [norm], (hidden, residual), max_size=max_tokens)

    def compare(self) -> None:
        """Compare the code with the modules themselves, at 1, 2 and 17 tokens.

        Raises :class:`CompiledCodeDiffers`, naming the number of tokens.
        """
        compiled = [layer for layer in self._layers if layer in self.layer]
        for num_tokens in _COMPARED_TOKENS:
            # All others share the code of the first; the last shows that weights are exchanged.
            for layer in (compiled[0], compiled[-1]):
                self._compare("a layer", self.layer, _run_layer, layer, num_tokens)
            self._compare("the last norm", self.norm, _run_norm, self._norm_module, num_tokens)

    def _compare(
        self,
        name: str,
        code: SharedCode,
        run: Callable[..., Parts],
        module: nn.Module,
        num_tokens: int,
    ) -> None:
        distances = []
        for seed in range(_NUM_TRIES):
            tensors = self._example(num_tokens, seed)
            if module is self._norm_module:
                tensors = tensors[1:]
            # Copies, since a norm overwrites what it is given.
            found = code(module, *(tensor.clone() for tensor in tensors))
            expected = run(module, *tensors)
            distances.append(max(map(_distance, found, expected)))
            if distances[-1] <= _TOLERANCES.get(self._dtype, 0.0):
                return
        raise CompiledCodeDiffers(
            f"the compiled code of {name} differs from it at {num_tokens} tokens, by "
            f"{min(distances):.2g} of the length of a token's states"
        )

    def _example(self, num_tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Return positions, hidden and residual, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        hidden, residual = (
            torch.randn(num_tokens, self._hidden_size, generator=generator).to(
                self._device, self._dtype
            )
            for _ in range(2)
        )
        return torch.arange(num_tokens, device=self._device), hidden, residual


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance of a token's states from those expected, relative to these.

    Infinite where one of them is not a number.
    """
    difference = (found.double() - expected.double()).norm(dim=-1)
    distances = difference / expected.double().norm(dim=-1).clamp(min=1e-12)
    return float(distances.nan_to_num(nan=torch.inf).max())


def _run_layer(layer: Any, positions: torch.Tensor, hidden: Any, residual: Any) -> Parts:
    hidden, residual = layer(positions, hidden, residual)
    return hidden, residual


def _run_norm(norm: Any, hidden: torch.Tensor, residual: torch.Tensor) -> Parts:
    hidden, residual = norm(hidden, residual)
    return hidden, residual
