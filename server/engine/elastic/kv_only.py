"""Keys and values of tokens that skip a layer in which later tokens look back at them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update


def write_keys_and_values(
    layer: Any, stream: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Write into the cache of ``layer`` what it would cache of KV-only tokens.

    That is what the first half of the layer makes of the stream as it passes by.

    Args:
        layer: A decoder layer of vLLM's.
        stream: [num_tokens, hidden_size], the residual stream of the tokens before the layer.
        positions: [num_tokens], their positions in their requests.
        tokens: [num_tokens], their indices in the step.
    """
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.input_layernorm(stream))
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    query, key, value = qkv.split(sizes, dim=-1)
    by_head = (-1, attention.num_kv_heads, attention.head_dim)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key.view(by_head)).view(key.shape)
    _, key = attention.rotary_emb(positions, query, key)

    slots = get_forward_context().slot_mapping
    assert isinstance(slots, dict)
    name = attention.attn.layer_name
    slots_of_step = slots[name]
    # The operation writes to the slots that it finds in the forward context.
    slots[name] = slots_of_step[tokens]
    unified_kv_cache_update(key.view(by_head), value.view(by_head), name)
    slots[name] = slots_of_step
