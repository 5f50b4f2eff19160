"""Code compiled from one module that runs every module built like it."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
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
    # The number of C++ compilers that run at a time; vLLM asks for one.
    "compile_threads": os.cpu_count() or 1,
}
# torch's message for a module that is not built like the first one; the error has no class.
_OTHER_MODULE = "fail_on_recompile"


class SharedCode:
    """A function of a module and some tensors, compiled once for many modules.

    torch.compile turns the function into bare code, whose inputs are the module's weights and
    whatever else of it may differ from one module to the next, the tensors, and their size. It
    surrounds this code with guards, which tell whether the code is right for a module, and with
    wrappers, which hand the inputs on. Both are used once for each module, when its inputs are
    collected. From then on the bare code is called with these: for a layer of a small model,
    guards and wrappers take as long as the layer.
    """

    def __init__(
        self,
        run: Run,
        modules: Sequence[nn.Module],
        tensors: Sequence[torch.Tensor],
        *,
        max_size: int,
    ) -> None:
        """Compile ``run`` for the first of ``modules``, and for those that are built like it.

        The first dimension of ``tensors``, two or more in these examples, is a variable of up to
        ``max_size``.

        Raises:
            ConstraintViolationError: The code depends on the size, for example on whether it is
                even; without guards it would be wrong for the other sizes.
            RuntimeError: The bare code needs its wrappers, as that of a module does which writes
                into what it is given, or has another variable than the size.
            Exception: What else torch.compile raises, for example without a C++ compiler.
        """
        for tensor in tensors:
            # With a range, torch refuses code that holds for a part of it only. It takes sizes
            # to be two or more, so the caller has to compare the code with `run` at one.
            torch._dynamo.mark_dynamic(tensor, 0, min=1, max=max_size)
        self._call = _Call()

        # A function of its own: what has been compiled of a function is kept with it.
        def function(module: nn.Module, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for tensor in given[1:]:
                # Else the sizes would be several variables where no operation needs them equal.
                torch._check(tensor.shape[0] == given[0].shape[0])
            return run(module, *given)

        trace: Any = torch.compile(function, backend=self._compile, fullgraph=True, dynamic=False)
        results = trace(modules[0], *tensors)
        if not self._call.is_bare(results):
            raise RuntimeError("the compiled code does not stand alone")
        # Which inputs change from call to call: the size, and the tensors.
        first = self._call.arguments
        self._size_indices = [index for index, value in enumerate(first) if isinstance(value, int)]
        self._tensor_indices = [
            (index, number)
            for index, value in enumerate(first)
            for number, tensor in enumerate(tensors)
            if value is tensor
        ]
        self._inputs = {id(modules[0]): first}
        for module in modules[1:]:
            if self._is_alike(trace, module, tensors):
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
        for index in self._size_indices:
            inputs[index] = size
        for index, number in self._tensor_indices:
            inputs[index] = tensors[number]
        first, second = self._code(inputs)
        return first, second

    @staticmethod
    def _is_alike(trace: Any, module: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
        """Run the module through guards and wrappers; return whether the guards let it pass."""
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                trace(module, *tensors)
        except RuntimeError as error:
            if _OTHER_MODULE in str(error):
                return False
            raise
        return True

    def _compile(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """Compile a graph and return it wrapped; torch.compile's backend.

        Keeps the bare code, and lets calls of the wrapped graph be recorded in ``self._call``.
        """
        bare: list[Any] = []

        def compile_inner(*arguments: Any, **options: Any) -> Any:
            bare.append(compile_fx_inner(*arguments, **options))
            return bare[-1]

        # With its cache, torch would keep the wrapped graph and not ask for the bare code.
        with functorch_config.patch(enable_autograd_cache=False):
            wrapped: Any = compile_fx(
                graph, examples, inner_compile=compile_inner, config_patches=dict(_OPTIONS)
            )
        if len(variables := set(_variables(examples))) != 1:
            names = ", ".join(sorted(map(str, variables))) or "none"
            raise RuntimeError(f"the size is not the only variable of the compiled code: {names}")
        code = self._code = bare[0].current_callable

        def run_code(inputs: list[Any]) -> Any:
            self._call.inputs = inputs.copy()  # the code empties the list
            self._call.outputs = code(inputs)
            return self._call.outputs

        def run(*arguments: Any) -> Any:
            self._call.arguments = list(arguments)
            return wrapped(*arguments)

        bare[0].current_callable = run_code
        return run


def _variables(examples: Sequence[Any]) -> Iterator[object]:
    """Yield the variable sizes in a graph's inputs, once for each place where they occur."""
    for example in examples:
        sizes = example.shape if isinstance(example, torch.Tensor) else [example]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                expression = size.node.shape_env.simplify(size.node.expr)
                yield from expression.free_symbols or [expression]


class _Call:
    """Inputs and outputs of one call of the bare code, inside and outside of its wrappers."""

    arguments: list[Any]
    inputs: list[Any]
    outputs: Sequence[torch.Tensor]

    def is_bare(self, results: Sequence[torch.Tensor]) -> bool:
        """Return whether the wrappers have passed on everything as it was."""
        return _same(self.inputs, self.arguments) and _same(self.outputs, results)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
