"""The entry point by which every process of vLLM learns of the elastic models."""

from __future__ import annotations


def register() -> None:
    """Register the elastic classes; called by vLLM, more than once in a process."""
    import torch
    from vllm import ModelRegistry

    from server.engine.elastic.architectures import ELASTIC_ARCHITECTURES
    from server.engine.elastic.model import ELASTIC_CLASSES
    from server.engine.elastic.orphan import end_with_parent
    from server.engine.start_failure import report_start_failures
    from server.engine.token_ranks import count_uncompiled

    end_with_parent()
    report_start_failures()
    _zero_new_cache_blocks()
    count_uncompiled()
    if torch.cpu._is_amx_tile_supported():
        # A process has to ask the kernel for AMX. Matrix products that are not quantized do, but
        # where vLLM's attention comes first, it would end with an illegal instruction.
        torch.cpu._init_amx()
    registered = ModelRegistry.get_supported_archs()
    for name, elastic_name in ELASTIC_ARCHITECTURES.items():
        # The class itself: of a dotted name vLLM would learn more in a process of its own.
        if elastic_name not in registered:
            ModelRegistry.register_model(elastic_name, ELASTIC_CLASSES[name])


def _zero_new_cache_blocks() -> None:
    """Have vLLM zero each block of the KV cache when a request is given it.

    Attention multiplies what it masks by zero, which does not undo a NaN. So where a request has
    computed a NaN, the blocks that it leaves behind would make a NaN of the next request's
    results. vLLM zeroes blocks for some models only, and has no setting for it.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda config: True)  # type: ignore[assignment, method-assign]
