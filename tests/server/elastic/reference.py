"""What a model must generate with layers left out, in plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from server.engine.base import LayerSelection


def load(checkpoint: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def cut(checkpoint: Path, removed: Sequence[int]) -> Any:
    """Return the model of ``checkpoint`` with layers really removed."""
    model = load(checkpoint)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in set(removed)]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [
            kind for i, kind in enumerate(model.config.layer_types) if i not in set(removed)
        ]
    return model


@torch.inference_mode()
def generate(model: Any, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Return greedy tokens by transformers' own generation, KV cache and all."""
    prompt = torch.tensor([list(prompt_ids)])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(output[0, prompt.shape[1] :].tolist())


@torch.inference_mode()
def logits_with_skips(
    model: Any,
    token_ids: Sequence[int],
    num_context: int,
    layers: LayerSelection,
    window: int | None = None,
) -> torch.Tensor:
    """Return logits [num_tokens, vocab_size] where each token skips the layers of its kind.

    Attention looks back ``window`` tokens, or on all.

    No cache: every layer is run on all tokens, so that all of them have keys and values there,
    and its output is kept for those that run it.
    """
    decoder = model.model
    ids = torch.tensor([list(token_ids)])
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    distance = positions[0][:, None] - positions[0][None, :]
    visible = (distance >= 0) & (distance < (window or ids.shape[1]))
    causal = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    is_context = (torch.arange(ids.shape[1]) < num_context)[None, :, None]
    for index, layer in enumerate(decoder.layers):
        out = layer(
            hidden,
            attention_mask=causal[None, None],
            position_ids=positions,
            position_embeddings=rotary,
        )
        runs = torch.where(
            is_context,
            torch.tensor(index not in layers.prefill_skips),
            torch.tensor(index not in layers.decode_skips),
        )
        hidden = torch.where(runs, out, hidden)
    logits: torch.Tensor = model.lm_head(decoder.norm(hidden))[0]
    return logits


def generate_with_skips(
    model: Any,
    prompt_ids: Sequence[int],
    num_tokens: int,
    layers: LayerSelection,
    window: int | None = None,
) -> list[int]:
    """Return greedy tokens where prompt and generated tokens may skip different layers."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        logits = logits_with_skips(model, ids, len(prompt_ids), layers, window)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt_ids) :]
