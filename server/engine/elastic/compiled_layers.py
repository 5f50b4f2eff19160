"""Decoder layers compiled once, for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

# Of a call into compiled code, most of the cost does not depend on what it does, so layers that
# follow one another are run four to a call.
_NUM_TOGETHER = 4
# Any number above one makes the compiler take the number of tokens for a variable.
_NUM_EXAMPLE_TOKENS = 16
_OPTIONS: dict[str, Any] = {
    # Of its guards, those that differ between layers were checked beforehand, the others hold.
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    "size_asserts": False,
    "nan_asserts": False,
    "cpp.dynamic_threads": True,
    # The processor's instructions are known from its flags; trying out whether the compiler
    # knows them takes longer than all that is compiled.
    "cpp.vec_isa_ok": True,
}

Parts = tuple[torch.Tensor, torch.Tensor]


class CompiledLayers:
    """Runs layers of one model, through compiled code those that are built alike.

    The weights are inputs of what is compiled. So one piece of code serves every layer that
    differs from the others in nothing but weights, and any four of them, whichever layers lie
    between. Until :meth:`compile` has been called, layers run as they are.
    """

    def __init__(self) -> None:
        self._alike: set[int] = set()
        self._one: Any = None
        self._four: Any = None

    def compile(self, layers: Sequence[nn.Module], hidden_size: int, dtype: torch.dtype) -> int:
        """Compile for ``layers`` and return how many of them are built alike.

        Must be called under a forward context without attention metadata. Raises what
        torch.compile raises, for example where there is no C++ compiler; layers go on running
        as they are then.
        """
        device = next(layers[0].parameters()).device
        positions = torch.zeros(_NUM_EXAMPLE_TOKENS, dtype=torch.long, device=device)
        hidden = torch.zeros(_NUM_EXAMPLE_TOKENS, hidden_size, dtype=dtype, device=device)
        for tensor in (positions, hidden):
            torch._dynamo.mark_dynamic(tensor, 0)

        def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            residual = hidden.clone()
            torch._dynamo.mark_dynamic(residual, 0)
            return positions, hidden, residual

        alike = _alike(layers, example)
        one = _compiled(_run_one)
        one(alike[0], *example())
        four: Any = None
        if len(alike) >= _NUM_TOGETHER:
            four = _compiled(_run_four)
            four(*alike[:_NUM_TOGETHER], *example())
        self._one, self._four = one, four
        self._alike = {id(layer) for layer in alike}
        return len(alike)

    def run(
        self,
        layers: Sequence[nn.Module],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
    ) -> Parts:
        """Run ``layers`` one after another; see :data:`residual_stream.RunLayers`."""
        for group in self._groups(layers):
            if len(group) == _NUM_TOGETHER:
                hidden, residual = self._four(*group, positions, hidden, residual)
            elif id(group[0]) in self._alike:
                hidden, residual = self._one(group[0], positions, hidden, residual)
            else:
                hidden, residual = group[0](positions, hidden, residual)
        return hidden, residual

    def _groups(self, layers: Sequence[nn.Module]) -> Iterator[Sequence[nn.Module]]:
        start = 0
        while start < len(layers):
            group = layers[start : start + _NUM_TOGETHER]
            if self._four is None or not self._together(group):
                group = group[:1]
            yield group
            start += len(group)

    def _together(self, group: Sequence[nn.Module]) -> bool:
        return len(group) == _NUM_TOGETHER and all(id(layer) in self._alike for layer in group)


def _compiled(function: Any) -> Any:
    # A copy: torch.compile takes entries out of it.
    return torch.compile(function, fullgraph=True, dynamic=False, options=dict(_OPTIONS))


def _alike(layers: Sequence[nn.Module], example: Any) -> list[nn.Module]:
    """Return the first layer and those after it that satisfy every guard of its."""
    guarded: Any = torch.compile(_run_guarded, backend="eager", fullgraph=True, dynamic=False)
    guarded(layers[0], *example())
    alike = [layers[0]]
    for layer in layers[1:]:
        # The error has no class of its own.
        with (
            contextlib.suppress(RuntimeError),
            torch.compiler.set_stance("fail_on_recompile"),
        ):
            guarded(layer, *example())
            alike.append(layer)
    return alike


# Functions of their own each: compiled code is kept by function, and without guards nothing else
# tells one piece from another.


def _run_guarded(layer: Any, positions: torch.Tensor, hidden: Any, residual: Any) -> Any:
    return layer(positions, hidden, residual)


def _run_one(layer: Any, positions: torch.Tensor, hidden: Any, residual: Any) -> Any:
    return layer(positions, hidden, residual)


def _run_four(
    first: Any,
    second: Any,
    third: Any,
    fourth: Any,
    positions: torch.Tensor,
    hidden: Any,
    residual: Any,
) -> Any:
    hidden, residual = first(positions, hidden, residual)
    hidden, residual = second(positions, hidden, residual)
    hidden, residual = third(positions, hidden, residual)
    return fourth(positions, hidden, residual)
