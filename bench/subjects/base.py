"""The interface between a load and the engine or server that it is put on."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import psutil

from bench.models import BenchModel
from bench.workload import Request
from server.calibration.hardware import describe_hardware
from server.engine.arguments import (
    IN_PROCESS_EXECUTOR,
    DtypeName,
    prepare_cpu_environment,
    prepare_environment,
)
from server.engine.elastic.engine_arguments import ElasticConfig
from server.engine.ranks import ONE_PROCESS, Ranks

# vLLM refuses to start where less of a GPU is free, whatever the size of the KV cache, and engines
# that are compared wait beside each other.
_GPU_MEMORY_SHARE = 0.05

# Chooses one of vLLM's two model runners on a GPU; the elastic engine sets it for itself.
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_GIVEN_RUNNER = os.environ.get(_RUNNER)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings of all engines of a comparison."""

    model: BenchModel
    dtype: str
    max_context: int
    max_num_seqs: int
    # Of all ranks together.
    kv_cache_bytes: int
    ranks: Ranks = ONE_PROCESS
    # These are for Fathom's engines only; ``engine_args`` are arguments of vLLM's engine.
    compile_layers: bool | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def vllm_arguments(self) -> dict[str, Any]:
        """Return the settings that every engine shares, as arguments of vLLM's engine."""
        arguments: dict[str, Any] = {
            "dtype": self.dtype,
            "max_model_len": self.max_context,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.kv_cache_bytes // self.ranks.number,
            "enable_prefix_caching": False,
            "tensor_parallel_size": self.ranks.tensor_parallel_size,
            "pipeline_parallel_size": self.ranks.pipeline_parallel_size,
        }
        if describe_hardware()["gpus"]:
            arguments["gpu_memory_utilization"] = _GPU_MEMORY_SHARE
        elif self.ranks == ONE_PROCESS:
            arguments["distributed_executor_backend"] = IN_PROCESS_EXECUTOR
        return arguments

    def fathom_engine_args(self) -> dict[str, Any]:
        """Return the settings that Fathom has no setting of its own for, as its ``engine_args``."""
        arguments = self.vllm_arguments()
        shared = ("kv_cache_memory_bytes", "enable_prefix_caching", "gpu_memory_utilization")
        return {
            **{name: arguments[name] for name in shared if name in arguments},
            **self.engine_args,
        }

    def elastic_config(self) -> ElasticConfig:
        return ElasticConfig(
            model=self.model.directory,
            name=self.model.name,
            dtype=cast(DtypeName, self.dtype),
            max_context=self.max_context,
            max_num_seqs=self.max_num_seqs,
            ranks=self.ranks,
            engine_args=self.fathom_engine_args(),
            compile_layers=self.compile_layers,
        )


class Subject(Protocol):
    """An engine or server that generates tokens."""

    name: str

    async def start(self) -> None:
        """Return when the subject answers."""

    def generate(self, request: Request) -> AsyncIterator[int]:
        """Yield the number of tokens in each message, as it comes."""
        ...

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the subject, other than this one."""
        ...

    async def close(self) -> None: ...


def prepare(model: BenchModel, threads: int | None) -> None:
    """Set the environment that every engine inherits, so that all have the same threads."""
    prepare_environment()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif not describe_hardware()["gpus"]:
        prepare_cpu_environment(model.directory)


@contextmanager
def own_choice_of_runner() -> Iterator[None]:
    """Let vLLM choose its model runner as if there were no elastic engine in this process."""
    present = os.environ.pop(_RUNNER, None)
    if _GIVEN_RUNNER is not None:
        os.environ[_RUNNER] = _GIVEN_RUNNER
    try:
        yield
    finally:
        os.environ.pop(_RUNNER, None)
        if present is not None:
            os.environ[_RUNNER] = present


def new_children(before: set[int]) -> list[psutil.Process]:
    """Return the descendants of this process that are not among ``before``."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.pid not in before]


def child_ids() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def free_port() -> int:
    """Return a port that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
