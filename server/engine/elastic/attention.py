"""vLLM's attention backends, with metadata that carries the step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from server.engine.elastic.row_table import RowTable
from server.engine.elastic.step import ElasticStep


@functools.cache
def elastic_backend(base: type[AttentionBackend], table: RowTable) -> type[AttentionBackend]:
    """Return ``base`` with metadata that also carries the step, as ``metadata.elastic_step``.

    Raises:
        NotImplementedError: ``base`` writes keys and values within its attention kernel, which
            leaves no way to write them for tokens that skip the layer.
    """
    if getattr(base, "forward_includes_kv_cache_update", True):
        raise NotImplementedError(
            f"attention backend {base.get_name()} cannot write keys and values apart from "
            "attention; choose another with engine_args.attention_backend"
        )
    return subclass_attention_backend("Elastic", base, _elastic_builder(base, table))


@functools.cache
def _elastic_builder(
    base: type[AttentionBackend], table: RowTable
) -> type[AttentionMetadataBuilder[Any]]:
    base_builder: Any = cast(Any, base).get_builder_cls()

    class ElasticMetadataBuilder(base_builder):  # type: ignore[misc]
        # True, vLLM would copy the metadata of one KV cache group, step and all, for another.
        supports_update_block_table = False

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            metadata.elastic_step = ElasticStep(self, common_attn_metadata, table)
            return metadata

        def build_plain(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
            """Return metadata without a step, for a subset of one."""
            return super().build(0, common_attn_metadata)

    return ElasticMetadataBuilder


@contextlib.contextmanager
def attention_without_cache(layers: Sequence[Any]) -> Iterator[None]:
    """Let attention return something that depends on its queries, keys and values alone.

    Outside of a step there is no KV cache to attend to, and vLLM's attention returns memory as
    it happens to be.
    """
    attentions = [layer.self_attn.attn for layer in layers]
    implementations = [attention.impl for attention in attentions]
    for attention in attentions:
        attention.impl = _AttentionWithoutCache(attention.impl)
    try:
        yield
    finally:
        for attention, implementation in zip(attentions, implementations, strict=True):
            attention.impl = implementation


class _AttentionWithoutCache:
    """Stands in for the implementation of attention, whose attributes it has."""

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._implementation, name)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *others: Any,
        output: torch.Tensor,
        **more: Any,
    ) -> torch.Tensor:
        """Write into ``output`` the sum of query, key and value of each head; return it."""
        heads_per_group = query.shape[1] // key.shape[1]
        both = (key + value).repeat_interleave(heads_per_group, dim=1)
        return output.copy_((query + both).view_as(output))
