"""vLLM's arguments and environment for every engine, and checks before one is started."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import psutil
from pydantic import ValidationError

from pruning.weights import weight_bytes
from server.engine.environment import check_directories
from server.engine.ranks import ONE_PROCESS, Ranks, bind_to_cores
from server.engine.start_failure import reason_of
from server.errors import InvalidArgument

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
GIB = 1 << 30
_SMALL_MODEL_BYTES = 64 << 20
# vLLM's arguments that Fathom sets itself, each with the setting to use instead, if there is one.
RESERVED: Mapping[str, str | None] = {
    "model": "model",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "dtype": "dtype",
    # Other formats than safetensors can hold code.
    "load_format": None,
    "max_model_len": "max_context",
    "max_num_seqs": "max_num_seqs",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "distributed_executor_backend": "distributed_executor_backend",
    "runner": None,
    "worker_extension_cls": None,
}
# The path in full: on CPU, vLLM turns the short name into an executor with one process more.
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of an engine. ``model`` is a local checkpoint directory."""

    model: Path
    # The model's name, as clients see it.
    name: str
    dtype: DtypeName = "auto"
    max_context: int | None = None
    max_num_seqs: int = 256
    ranks: Ranks = ONE_PROCESS
    # Of all ranks together; None: on CPU a quarter of the free memory, at most 4 GiB.
    kv_cache_gib: float | None = None
    trust_remote_code: bool = False
    # Has an effect on CPUs alone, and not for small models.
    huge_pages: bool = True
    engine_args: Mapping[str, Any] = field(default_factory=dict)


def base_arguments(config: EngineConfig) -> dict[str, Any]:
    """Return vLLM's arguments for ``config``, without those of ``engine_args``."""
    from vllm.config import StructuredOutputsConfig

    return {
        "model": str(config.model),
        "served_model_name": config.name,
        "dtype": config.dtype,
        "max_model_len": config.max_context,
        "max_num_seqs": config.max_num_seqs,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_size": config.ranks.tensor_parallel_size,
        "pipeline_parallel_size": config.ranks.pipeline_parallel_size,
        "distributed_executor_backend": config.ranks.backend,
        "load_format": "safetensors",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": "server.engine.worker_extension.WorkerExtension",
        # A model that may write white space between the parts of JSON may do so for ever.
        "structured_outputs_config": StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True
        ),
    }


def cpu_arguments(
    config: EngineConfig, *, quantized: bool, kv_cache_bytes: int | None = None
) -> dict[str, Any]:
    """Return the additional arguments for a CPU.

    Raises :class:`InvalidArgument` for ranks that vLLM cannot start here.
    """
    if config.ranks.backend == "ray":
        allowed = "mp or none on CPU: vLLM knows no CPU as a resource of a Ray cluster"
        raise InvalidArgument("distributed_executor_backend", "ray", allowed)
    if kv_cache_bytes is None:
        kv_cache_bytes = cpu_kv_cache_bytes(config.kv_cache_gib)
    arguments: dict[str, Any] = {
        "dtype": cpu_dtype(config.dtype, quantized=quantized),
        "kv_cache_memory_bytes": kv_cache_bytes // config.ranks.number,
    }
    if config.ranks.number > 1:
        bind_to_cores(config.ranks)
    elif config.ranks.backend is None:
        arguments["distributed_executor_backend"] = IN_PROCESS_EXECUTOR
    return arguments


def gpu_arguments(config: EngineConfig, share: float = 1.0) -> dict[str, Any]:
    """Return the additional arguments for GPUs, for an engine with a share of the KV cache.

    Without a size in ``config``, vLLM's ``gpu_memory_utilization`` decides.

    Raises :class:`InvalidArgument` for more than the GPUs have.
    """
    if config.kv_cache_gib is None:
        return {}
    from vllm.platforms import current_platform

    num_gpus = config.ranks.number
    memory = current_platform.get_device_total_memory() * num_gpus
    kv_cache_bytes = _given_bytes(config.kv_cache_gib, memory, "the GPUs")
    # vLLM's argument is for each GPU.
    return {"kv_cache_memory_bytes": int(share * kv_cache_bytes) // num_gpus}


def check_engine_args(
    engine_args: Mapping[str, Any], reserved: Mapping[str, str | None] = RESERVED
) -> None:
    """Raise :class:`InvalidArgument` for a name that may not be passed through to vLLM."""
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name, value in engine_args.items():
        if name in reserved:
            instead = reserved[name]
            allowed = f"the setting {instead} instead" if instead else "left to Fathom"
            raise InvalidArgument(f"engine_args.{name}", value, allowed)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            allowed = "an argument of vLLM's engine"
            if near:
                allowed += f", such as {', '.join(near)}"
            raise InvalidArgument(f"engine_args.{name}", value, allowed)


def check_kv_cache(config: VllmConfig, given_gib: float | None) -> None:
    """Raise :class:`InvalidArgument` if the cache cannot hold one request of the whole context.

    vLLM checks this, too, but in another process, and its error does not name the setting. The
    check is left to vLLM where vLLM chooses the size, and for models with sliding windows.
    """
    cache, model = config.cache_config, config.model_config
    if cache.kv_cache_memory_bytes is None or model.get_sliding_window() is not None:
        return
    num_ranks = config.parallel_config.world_size
    num_blocks = math.ceil(model.max_model_len / cache.block_size) + 1
    bytes_per_token = (
        2
        * model.get_num_layers(config.parallel_config)
        * model.get_num_kv_heads(config.parallel_config)
        * model.get_head_size()
        * cast("torch.dtype", model.dtype).itemsize
    )
    # Of one rank, which has a part of the heads and layers.
    needed = num_blocks * cache.block_size * bytes_per_token
    if needed > cache.kv_cache_memory_bytes and cache.num_gpu_blocks_override is None:
        raise InvalidArgument(
            "kv_cache_gib",
            cache.kv_cache_memory_bytes * num_ranks / GIB if given_gib is None else given_gib,
            f"at least {needed * num_ranks / GIB:.3g} for a context of {model.max_model_len} "
            "tokens; or set a smaller max_context",
        )


def refusal(error: Exception, config: EngineConfig) -> InvalidArgument:
    """Return vLLM's error as one that names the setting that it comes from.

    If vLLM's reason names no setting, that is the model itself.
    """
    reason = reason_of(error)
    if isinstance(error, ValidationError):
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        reason = " ".join(reason.split())
    first = reason.partition(". ")[0]
    for argument in ("max_model_len", "max_num_seqs", "dtype"):
        if argument in first and (setting := RESERVED[argument]) is not None:
            return InvalidArgument(setting, getattr(config, setting), f"what vLLM takes: {first}")
    if (of_ranks := config.ranks.refused_setting(reason)) is not None:
        return InvalidArgument(*of_ranks, f"what vLLM takes: {reason}")
    for argument, value in config.engine_args.items():
        if argument in reason or repr(value) in reason:
            return InvalidArgument(f"engine_args.{argument}", value, f"what vLLM takes: {reason}")
    return InvalidArgument("model", str(config.model), f"what vLLM takes: {reason}")


def cpu_dtype(dtype: DtypeName, *, quantized: bool) -> DtypeName:
    """Return the data type for a CPU.

    On processors without instructions for bfloat16, it runs at a third of float32's speed, and
    float16 is slower still. vLLM's quantized kernels do not support float32.
    """
    import torch

    if dtype != "auto":
        return dtype
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 or quantized else "float32"


def cpu_kv_cache_bytes(gib: float | None) -> int:
    """Return the size of the KV cache on a CPU.

    Raises :class:`InvalidArgument` for more than the machine has.
    """
    memory = psutil.virtual_memory()
    if gib is None:
        return min(4 * GIB, memory.available // 4)
    return _given_bytes(gib, memory.total, "this machine")


def _given_bytes(gib: float, memory_bytes: int, owner: str) -> int:
    """Return the size of a KV cache; raise :class:`InvalidArgument` if it exceeds the memory."""
    if gib * GIB > memory_bytes:
        allowed = f"at most {memory_bytes / GIB:.3g}, the memory of {owner}"
        raise InvalidArgument("kv_cache_gib", gib, allowed)
    return int(gib * GIB)


def prepare_environment() -> None:
    """Set variables for vLLM and its processes, except those that the operator has set.

    Raises :class:`InvalidArgument` for a variable that names an unusable directory.
    """
    check_directories()
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM then reports for each request whether the model's output had NaNs.
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
        # By default vLLM forks on a GPU, and a fork has none of the threads that gRPC relies on.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Threads wait for each other after every operation. By default they spin for milliseconds
        # before they sleep; where another program has the core of one of them, all others burn
        # theirs, and an engine of two threads becomes many times slower.
        "GOMP_SPINCOUNT": "3000",
        # Packages that vLLM imports warn of changes in their next versions.
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_cpu_environment(model: Path) -> None:
    """Set the number of threads of the engine's process; vLLM's own default is one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cpu_threads(model)))


def wants_huge_pages(config: EngineConfig) -> bool:
    """Return whether the engine's memory is to be moved into huge pages.

    A small model gains nothing: its weights stay in the processor's caches.
    """
    from vllm.platforms import current_platform

    is_small = weight_bytes(config.model) < _SMALL_MODEL_BYTES
    return config.huge_pages and current_platform.is_cpu() and not is_small


def num_cpu_threads(model: Path, num_cores: int | None = None) -> int:
    """Return how many of ``num_cores``, by default all of this process's, an engine is to use.

    A small model gets one. Threads wait for each other after every operation; with small matrices
    that gains nothing, and costs much where other processes need the cores.
    """
    if weight_bytes(model) < _SMALL_MODEL_BYTES:
        return 1
    return num_cores or len(os.sched_getaffinity(0))
