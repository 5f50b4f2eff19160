"""Timers inside vLLM's engine process, used by profiles only.

They wrap methods of vLLM and of the elastic engine, by name. A method that a version of vLLM does
not have is left out, and its time counts as that of its caller.
"""

from __future__ import annotations

import importlib
from typing import Any

from bench.stopwatch import Stopwatch

_PARALLEL = "vllm.distributed.parallel_state"
# The part of a step that each method (module, class, method) belongs to. A method that is called
# by another one of these is counted separately.
_METHODS = (
    ("vllm.v1.engine.core", "EngineCoreProc", "_process_engine_step", "engine loop"),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", "scheduler"),
    ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output", "scheduler"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "execute_model", "runner, other"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "sample_tokens", "runner, other"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_update_states", "input preparation"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs", "input preparation"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_preprocess", "input preparation"),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_build_attention_metadata",
        "attention metadata",
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_model_forward", "forward"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_sample", "sampling"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_bookkeeping_sync", "bookkeeping"),
    ("server.engine.elastic.attention", "ElasticStep", "__init__", "subset metadata"),
    ("server.engine.elastic.attention", "ElasticStep", "_make_subset", "subset metadata"),
    (
        "server.engine.elastic.residual_stream",
        "ResidualStream",
        "_catch_up",
        "gather, scatter",
    ),
    ("server.engine.elastic.compiled_layers", "CompiledLayers", "run", "layers"),
    # Between ranks; where layers are compiled on a CPU, this is part of them and not called.
    (_PARALLEL, "GroupCoordinator", "_all_reduce_out_place", "communication"),
    (_PARALLEL, "GroupCoordinator", "_all_gather_out_place", "communication"),
    (_PARALLEL, "GroupCoordinator", "gather", "communication"),
    (_PARALLEL, "GroupCoordinator", "send_tensor_dict", "communication"),
    (_PARALLEL, "GroupCoordinator", "recv_tensor_dict", "communication"),
)


class StepTimers:
    """The extension of vLLM's worker."""

    model_runner: Any
    _bench_stopwatch: Stopwatch | None = None

    def bench_start_timers(self) -> list[str]:
        """Begin to count; return the names of methods that this version of vLLM does not have."""
        import torch

        from server.engine.elastic.model import ElasticCausalLM

        if self._bench_stopwatch is not None:
            self._bench_stopwatch.reset()
            return []
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
        stopwatch = self._bench_stopwatch = Stopwatch(synchronize=synchronize)
        missing = []
        for module, class_name, method, part in _METHODS:
            owner = getattr(importlib.import_module(module), class_name, None)
            if owner is None or method not in vars(owner):
                missing.append(f"{module}.{class_name}.{method}")
                continue
            setattr(owner, method, stopwatch.timed(part, getattr(owner, method)))
        model = self.model_runner.model
        if not isinstance(model, ElasticCausalLM):
            # Where vLLM has compiled the model as a whole, none of these is called.
            for layer in model.model.layers:
                layer.forward = stopwatch.timed("layers", layer.forward)
        model.compute_logits = stopwatch.timed("logits", model.compute_logits)
        return missing

    def bench_read_timers(self) -> dict[str, list[float]]:
        """Return (calls, seconds) by part since the start of the count."""
        assert self._bench_stopwatch is not None
        return self._bench_stopwatch.totals()
