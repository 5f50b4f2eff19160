"""Attention metadata for some of a step's tokens."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from server.engine.elastic.row_table import RowTable
from server.engine.elastic.token_spans import Bools, Ints, TokenSpans, token_indices

# Fields of CommonAttentionMetadata with one entry for each row or token of the step, which a
# subset must cut; those that are absent in a vLLM version, or None, are left alone.
_ROW_FIELDS = (
    "block_table_tensor",
    "is_prefilling",
    "req_idx",
    "rswa_prefix_lens",
    "dcp_local_seq_lens",
)
_TOKEN_FIELDS = ("slot_mapping", "positions")
_CACHE_FIELDS = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")


class Runners(enum.Enum):
    """Which tokens of a step run a layer, where no subset is needed."""

    EVERY = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True, slots=True, eq=False)
class TokenSubset:
    """Some tokens of a step and what attention needs to know to run on them alone.

    ``key`` says which tokens: those of equal keys are the same, also if they are of layers that
    keep their caches apart.
    """

    key: bytes
    tokens: torch.Tensor
    slot_mapping: torch.Tensor
    metadata: Any

    def install(self, context: ForwardContext, layer_name: str) -> None:
        """Let the attention layer of this name see the subset as its whole step."""
        metadata, slots = context.attn_metadata, context.slot_mapping
        assert isinstance(metadata, dict) and isinstance(slots, dict)
        metadata[layer_name], slots[layer_name] = self.metadata, self.slot_mapping


class ElasticStep:
    """One step as the layers of one KV cache group see it.

    Subsets are made when a layer first needs one and kept by the spans that are in it, so a step
    with k different depths makes at most k of them, whatever the number of layers.
    """

    def __init__(self, builder: Any, common: CommonAttentionMetadata, table: RowTable) -> None:
        self._builder = builder
        self._common = common
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        lengths = query_start[1:] - query_start[:-1]
        # Exact for every row as long as nothing decodes speculatively.
        bound = common.seq_lens_cpu_upper_bound
        sequence_lengths = (common.seq_lens.cpu() if bound is None else bound).numpy()
        self.first_position: Ints = sequence_lengths.astype(np.int64) - lengths
        self.spans = TokenSpans.of_step(table, query_start, self.first_position)
        self._query_start = query_start
        self._subsets: dict[bytes, TokenSubset] = {}
        self._run_by_all: Bools = np.asarray(self.spans.runs.all(axis=0))
        self._run_by_any: Bools = np.asarray(self.spans.runs.any(axis=0))
        # Each layer is run by all tokens or by none, and leaves nothing where it is not run.
        self.is_uniform = self.spans.leaves_keys is None and bool(
            (self._run_by_all == self._run_by_any).all()
        )

    def runners(self, layer: int) -> Runners | TokenSubset:
        """Return the tokens that run ``layer``."""
        if self._run_by_all[layer]:
            return Runners.EVERY
        if not self._run_by_any[layer]:
            return Runners.NONE
        return self._subset(self.spans.runs[:, layer])

    def key_leavers(self, layer: int) -> torch.Tensor | None:
        """Return the tokens that skip ``layer`` but leave keys and values in it."""
        if self.spans.leaves_keys is None:
            return None
        leaving = self.spans.leaves_keys[:, layer]
        if not leaving.any():
            return None
        return self._on_device(token_indices(self.spans.starts[leaving], self.spans.stops[leaving]))

    @property
    def num_tokens(self) -> int:
        return int(self._query_start[-1])

    def has_row(self, row: int) -> bool:
        return row < len(self.first_position)

    def row_tokens(self, row: int) -> slice:
        return slice(int(self._query_start[row]), int(self._query_start[row + 1]))

    def _subset(self, chosen: Bools) -> TokenSubset:
        key = chosen.tobytes()
        subset = self._subsets.get(key)
        if subset is None:
            subset = self._subsets[key] = self._make_subset(chosen, key)
        return subset

    def _make_subset(self, chosen: Bools, key: bytes) -> TokenSubset:
        common = self._common
        rows, first = np.unique(self.spans.rows[chosen], return_index=True)
        last = np.append(first[1:], int(chosen.sum())) - 1
        starts, stops = self.spans.starts[chosen][first], self.spans.stops[chosen][last]
        lengths = stops - starts
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        query_start_cpu = torch.from_numpy(query_start)
        tokens = self._on_device(token_indices(starts, stops))
        row_index = self._on_device(rows)
        # Tokens of a row that come after those of the subset are not there yet for this layer.
        num_later = self._query_start[rows + 1] - stops
        sequence_lengths = common.seq_lens[row_index]
        if num_later.any():
            sequence_lengths -= self._on_device(num_later).to(sequence_lengths.dtype)
        changes: dict[str, Any] = {
            "query_start_loc_cpu": query_start_cpu,
            "query_start_loc": query_start_cpu.to(common.query_start_loc.device),
            "seq_lens": sequence_lengths,
            "num_reqs": len(rows),
            "num_actual_tokens": len(tokens),
            "max_query_len": int(lengths.max()),
        }
        if common.seq_lens_cpu_upper_bound is not None:
            bound = common.seq_lens_cpu_upper_bound[torch.from_numpy(rows)]
            changes["seq_lens_cpu_upper_bound"] = bound - torch.from_numpy(num_later).to(
                bound.dtype
            )
        for name in _CACHE_FIELDS:
            if hasattr(common, name):
                changes[name] = None
        for names, index in ((_ROW_FIELDS, row_index), (_TOKEN_FIELDS, tokens)):
            for name in names:
                value = getattr(common, name, None)
                if value is not None:
                    changes[name] = _selected(value, index)
        subset = common.replace(**changes)
        return TokenSubset(key, tokens, subset.slot_mapping, self._builder.build_plain(subset))

    def _on_device(self, indices: Ints) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._common.query_start_loc.device)


def _selected(values: Any, index: torch.Tensor) -> Any:
    if isinstance(values, torch.Tensor):
        return values[index.to(values.device)]
    return values[index.cpu().numpy()]


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
        # It would copy the metadata of one KV cache group, step and all, for another.
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
            return super().build(0, common_attn_metadata)

    return ElasticMetadataBuilder
