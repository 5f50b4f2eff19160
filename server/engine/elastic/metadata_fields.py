"""Fields of vLLM's attention metadata, and how each is cut down to some of a step's tokens."""

from __future__ import annotations

import enum


class FieldKind(enum.Enum):
    """Kind of a field of ``CommonAttentionMetadata``: how a subset of the tokens gets its value."""

    # Counts, lengths and starts, which are computed for the subset.
    COMPUTED = enum.auto()
    # One entry for each row, of which those of the subset's rows are taken. A single value that
    # stands for all rows is left as it is.
    ROW = enum.auto()
    # One entry for each token, likewise.
    TOKEN = enum.auto()
    # A value of the whole step that holds for any part of it.
    SCALAR = enum.auto()
    # A value that vLLM derives from other fields and keeps; dropped, so that it is derived anew.
    CACHE = enum.auto()
    # A part of vLLM that the elastic engine does not use; a step that sets it is an error.
    UNUSED = enum.auto()


FIELD_KINDS = {
    "query_start_loc": FieldKind.COMPUTED,
    "query_start_loc_cpu": FieldKind.COMPUTED,
    "seq_lens": FieldKind.COMPUTED,
    "seq_lens_cpu_upper_bound": FieldKind.COMPUTED,
    "num_reqs": FieldKind.COMPUTED,
    "num_actual_tokens": FieldKind.COMPUTED,
    "max_query_len": FieldKind.COMPUTED,
    "block_table_tensor": FieldKind.ROW,
    "causal": FieldKind.ROW,
    "is_prefilling": FieldKind.ROW,
    "req_idx": FieldKind.ROW,
    "rswa_prefix_lens": FieldKind.ROW,
    "replayssm_decode_base_cpu": FieldKind.ROW,
    "slot_mapping": FieldKind.TOKEN,
    "positions": FieldKind.TOKEN,
    # An upper bound.
    "max_seq_len": FieldKind.SCALAR,
    "_num_computed_tokens_cache": FieldKind.CACHE,
    "_token_to_req_indices_cache": FieldKind.CACHE,
    # kv_sharing_fast_prefill
    "logits_indices_padded": FieldKind.UNUSED,
    "num_logits_indices": FieldKind.UNUSED,
    "max_logits_per_req": FieldKind.UNUSED,
    # models with an encoder
    "encoder_seq_lens": FieldKind.UNUSED,
    "encoder_seq_lens_cpu": FieldKind.UNUSED,
    # decode_context_parallel_size
    "dcp_local_seq_lens": FieldKind.UNUSED,
    "dcp_local_seq_lens_cpu_upper_bound": FieldKind.UNUSED,
    # images
    "mm_req_doc_ranges": FieldKind.UNUSED,
}


def fields_of(kind: FieldKind) -> tuple[str, ...]:
    """Return the names of the fields of a kind."""
    return tuple(name for name, its_kind in FIELD_KINDS.items() if its_kind is kind)
