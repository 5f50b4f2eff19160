"""Compiled layers against the same layers as they are."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from server.engine.elastic.compiled_layers import CompiledCodeDiffers, CompiledLayers
from server.engine.elastic.out_of_memory import is_out_of_memory
from server.engine.elastic.shared_code import SharedCode

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
    assert compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64) == 9
    for chosen in (layers, layers[:4], layers[1::2], layers[::3], layers[8:], []):
        for num_tokens in (1, 2, 16, 33):
            expected = one_by_one(chosen, num_tokens)
            torch.testing.assert_close(together(compiled, chosen, num_tokens), expected)


def test_layer_that_is_built_otherwise_runs_as_it_is() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Layer(), Layer(), Layer(3.0), Layer(), Layer(), Layer()]
    compiled = CompiledLayers()
    assert compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64) == 5
    for chosen in (layers, [layers[2]], layers[3:], layers[:2] + layers[3:]):
        torch.testing.assert_close(together(compiled, chosen, 5), one_by_one(chosen, 5))


class Overwriting(Layer):
    """Adds to its input in place, which the compiler leaves to its wrappers."""

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
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)
    torch.testing.assert_close(together(compiled, layers, 5), one_by_one(layers, 5))


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_norm_equals_itself_uncompiled(num_tokens: int) -> None:
    norm = Norm()
    _, hidden, residual = stream(num_tokens)
    compiled = CompiledLayers()
    torch.testing.assert_close(
        compiled.normalize(norm, hidden, residual), norm(hidden, residual)[0]
    )
    compiled.compile([Layer()], norm, HIDDEN_SIZE, torch.float32, max_tokens=64)
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
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)
    torch.testing.assert_close(together(compiled, layers, 3), one_by_one(layers, 3))


class Even(Layer):
    """Treats an even number of tokens otherwise than an odd one."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = super().forward(positions, hidden, residual)
        return (hidden * 2 if len(hidden) % 2 == 0 else hidden), residual


class Small(Layer):
    """Treats up to thirty tokens otherwise than more."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = super().forward(positions, hidden, residual)
        return (hidden * 2 if len(hidden) <= 30 else hidden), residual


@pytest.mark.parametrize("kind", [Even, Small])
def test_code_that_depends_on_the_number_of_tokens_is_refused(kind: type[Layer]) -> None:
    """Its guards would be dropped, and the code be wrong for other numbers."""
    layers: list[nn.Module] = [kind() for _ in range(3)]
    compiled = CompiledLayers()
    with pytest.raises(ConstraintViolationError):
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)
    for num_tokens in (4, 5, 33):
        torch.testing.assert_close(
            together(compiled, layers, num_tokens), one_by_one(layers, num_tokens)
        )


class Single(Layer):
    """Treats one token otherwise, which the compiler takes to be impossible."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = super().forward(positions, hidden, residual)
        return (hidden * 2 if len(hidden) == 1 else hidden), residual


def test_code_that_differs_from_the_layer_is_not_used() -> None:
    layers: list[nn.Module] = [Single() for _ in range(3)]
    compiled = CompiledLayers()
    with pytest.raises(CompiledCodeDiffers, match="of a layer differs from it at 1 tokens"):
        compiled.compile(layers, Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)
    for num_tokens in (1, 2):
        torch.testing.assert_close(
            together(compiled, layers, num_tokens), one_by_one(layers, num_tokens)
        )


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
def test_wrong_code_is_found_at_each_number_of_tokens(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = SharedCode.__call__

    def wrong(code: SharedCode, module: nn.Module, *tensors: torch.Tensor) -> object:
        first, second = call(code, module, *tensors)
        return (first * 1.1 if len(first) == num_tokens else first), second

    monkeypatch.setattr(SharedCode, "__call__", wrong)
    with pytest.raises(CompiledCodeDiffers, match=f"at {num_tokens} tokens"):
        CompiledLayers().compile([Layer()], Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)


class Hungry(Layer):
    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling():
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(positions, hidden, residual)


def test_running_out_of_memory_is_told_from_what_a_compiler_finds() -> None:
    with pytest.raises(RuntimeError) as caught:
        CompiledLayers().compile([Hungry()], Norm(), HIDDEN_SIZE, torch.float32, max_tokens=64)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the compiler has failed") from torch.OutOfMemoryError("CUDA")
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("no C++ compiler"))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(12, "no memory")]
)
def test_out_of_memory_ends_the_start_and_other_failures_do_not(error: Exception) -> None:
    from server.engine.elastic.worker_extension import ElasticWorkerExtension

    class Model:
        def compile_layers(self, config: object) -> int:
            raise self.error

        error: Exception

    class Worker(ElasticWorkerExtension):
        def _elastic_model(self) -> Any:
            return model

    model, worker = Model(), Worker()
    worker.model_runner = SimpleNamespace(vllm_config=None)
    model.error = error
    with pytest.raises(type(error)):
        worker.fathom_compile_layers()
    model.error = RuntimeError("no compiler\nand more")
    assert worker.fathom_compile_layers() == (0, "no compiler")
