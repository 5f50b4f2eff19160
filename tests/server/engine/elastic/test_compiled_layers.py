"""Compiled layers against the same layers as they are."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from server.engine.elastic.compiled_layers import CompiledLayers

HIDDEN_SIZE = 8

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler; no g++ on the PATH"
)


class Layer(nn.Module):
    """In the shape of vLLM's decoder layers."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
        self.scale = scale
        self.requires_grad_(False)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden + residual
        return self.linear(total) * self.scale + positions[:, None], total


class Norm(nn.Module):
    """In the shape of vLLM's norms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN_SIZE), requires_grad=False)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden + residual
        return total / total.norm(dim=-1, keepdim=True) * self.weight, total


def stream(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, residual = torch.randn(2, num_tokens, HIDDEN_SIZE)
    return torch.arange(num_tokens), hidden, residual


def one_by_one(layers: list[nn.Module], num_tokens: int) -> tuple[object, object]:
    torch.manual_seed(num_tokens)
    positions, hidden, residual = stream(num_tokens)
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual)
    return hidden, residual


def together(compiled: CompiledLayers, layers: list[nn.Module], num_tokens: int) -> object:
    torch.manual_seed(num_tokens)
    return compiled.run(layers, *stream(num_tokens))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_any_selection_of_layers_at_any_number_of_tokens_equals_the_layers_one_by_one() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Layer() for _ in range(9)]
    compiled = CompiledLayers()
    assert compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32) == 9
    for chosen in (layers, layers[:4], layers[1::2], layers[::3], layers[8:], []):
        for num_tokens in (1, 2, 16, 33):
            expected = one_by_one(chosen, num_tokens)
            torch.testing.assert_close(together(compiled, chosen, num_tokens), expected)


def test_layer_that_is_built_otherwise_runs_as_it_is() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Layer(), Layer(), Layer(3.0), Layer(), Layer(), Layer()]
    compiled = CompiledLayers()
    assert compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32) == 5
    for chosen in (layers, [layers[2]], layers[3:], layers[:2] + layers[3:]):
        torch.testing.assert_close(together(compiled, chosen, 5), one_by_one(chosen, 5))


class Overwriting(Layer):
    """Adds to what it is given, which is for the compiler's wrappers to do."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual.add_(hidden)
        return self.linear(residual), residual


def test_layers_that_write_into_their_inputs_run_as_they_are() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Overwriting() for _ in range(3)]
    compiled = CompiledLayers()
    with pytest.raises(RuntimeError, match="does not stand alone"):
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32)
    torch.testing.assert_close(together(compiled, layers, 5), one_by_one(layers, 5))


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_norm_equals_itself_uncompiled(num_tokens: int) -> None:
    norm = Norm()
    _, hidden, residual = stream(num_tokens)
    compiled = CompiledLayers()
    torch.testing.assert_close(
        compiled.normalize(norm, hidden, residual), norm(hidden, residual)[0]
    )
    compiled.compile([Layer()], norm, HIDDEN_SIZE, torch.float32)
    torch.testing.assert_close(
        compiled.normalize(norm, hidden, residual), norm(hidden, residual)[0]
    )


class Unhappy(Layer):
    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.graph_break()
        return super().forward(positions, hidden, residual)


def test_layers_that_cannot_be_compiled_run_as_they_are() -> None:
    layers: list[nn.Module] = [Unhappy() for _ in range(5)]
    compiled = CompiledLayers()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32)
    torch.testing.assert_close(together(compiled, layers, 3), one_by_one(layers, 3))
