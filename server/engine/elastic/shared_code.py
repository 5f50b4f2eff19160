"""Code compiled from one module that runs every module built like it."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

# (module, *tensors) -> two tensors
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]

_OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "nan_asserts": False,
    "cpp.dynamic_threads": True,
    # The processor's instructions are known from its flags; trying out whether the compiler
    # knows them takes longer than all that is compiled.
    "cpp.vec_isa_ok": True,
    # How many C++ compilers run at a time; vLLM asks for one.
    "compile_threads": os.cpu_count() or 1,
}


class SharedCode:
    """What a function does with a module and some tensors, compiled once for many modules.

    A module's weights, and whatever else of it may differ from one to the next, are inputs of
    the code. They are found by torch.compile, whose guards tell which modules are alike. When it
    runs, neither guards nor any of the wrappers around the code are in the way: for a layer of a
    small model those take as long as the layer.
    """

    def __init__(
        self, run: Run, modules: Sequence[nn.Module], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Compile ``run`` for the first of ``modules``, and for those that are alike.

        The first dimension of ``tensors``, two or more, is taken for a variable. Raises what
        torch.compile raises, for example where there is no C++ compiler, and RuntimeError where
        the wrappers are needed, as they are for a module that writes into what it is given.
        """
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        self._call = _Call()
        # A function of its own: what has been compiled of a function is kept with it.
        trace: Any = torch.compile(
            lambda module, *given: run(module, *given),
            backend=self._compile,
            fullgraph=True,
            dynamic=False,
        )
        results = trace(modules[0], *tensors)
        if not self._call.is_bare(results):
            raise RuntimeError("the compiled code does not stand alone")
        inputs = self._call.arguments
        self._sizes = [place for place, value in enumerate(inputs) if isinstance(value, int)]
        self._places = [
            (place, number)
            for place, value in enumerate(inputs)
            for number, tensor in enumerate(tensors)
            if value is tensor
        ]
        self._inputs = {id(modules[0]): inputs}
        for module in modules[1:]:
            # The error has no class of its own.
            with (
                contextlib.suppress(RuntimeError),
                torch.compiler.set_stance("fail_on_recompile"),
            ):
                trace(module, *tensors)
                self._inputs[id(module)] = self._call.arguments
        del self._call

    def __len__(self) -> int:
        """Return how many modules the code runs."""
        return len(self._inputs)

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._inputs

    def __call__(
        self, module: nn.Module, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a module that is contained on tensors of equal first dimension."""
        inputs = self._inputs[id(module)].copy()
        size = len(tensors[0])
        for place in self._sizes:
            inputs[place] = size
        for place, number in self._places:
            inputs[place] = tensors[number]
        first, second = self._code(inputs)
        return first, second

    def _compile(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        compiled: list[Any] = []

        def compile_inner(*arguments: Any, **options: Any) -> Any:
            compiled.append(compile_fx_inner(*arguments, **options))
            return compiled[-1]

        # It would keep the wrappers, too, and not ask for the code alone.
        with functorch_config.patch(enable_autograd_cache=False):
            wrapped: Any = compile_fx(
                graph, examples, inner_compile=compile_inner, config_patches=dict(_OPTIONS)
            )
        code = self._code = compiled[0].current_callable

        def run_code(inputs: list[Any]) -> Any:
            self._call.inputs = inputs.copy()  # it empties them
            self._call.outputs = code(inputs)
            return self._call.outputs

        def run(*arguments: Any) -> Any:
            self._call.arguments = list(arguments)
            return wrapped(*arguments)

        compiled[0].current_callable = run_code
        return run


class _Call:
    """What went into the code and came out of it, within its wrappers and outside of them."""

    arguments: list[Any]
    inputs: list[Any]
    outputs: Sequence[torch.Tensor]

    def is_bare(self, results: Sequence[torch.Tensor]) -> bool:
        """Return whether the wrappers have passed on everything as it was."""
        return _same(self.inputs, self.arguments) and _same(self.outputs, results)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
