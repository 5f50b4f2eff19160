"""The entry point by which every process of vLLM learns of the elastic models."""

from __future__ import annotations


def register() -> None:
    """Register the elastic classes; called by vLLM, more than once in a process."""
    import torch
    from vllm import ModelRegistry

    from server.engine.elastic.architectures import ELASTIC_ARCHITECTURES
    from server.engine.elastic.model import ELASTIC_CLASSES
    from server.engine.elastic.orphan import end_with_parent
    from server.engine.token_ranks import count_uncompiled

    end_with_parent()
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
