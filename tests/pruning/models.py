"""Outputs of transformers for a checkpoint, whole or with layers left out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

PROMPTS = torch.arange(3, 93).reshape(5, 18)


def load(directory: Path) -> Any:
    auto: Any = hf.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        trust_remote_code=True,
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def generate(model: Any, num_tokens: int = 12) -> list[list[int]]:
    """Return the prompts with greedy tokens after them."""
    return list(
        model.generate(
            PROMPTS,
            attention_mask=torch.ones_like(PROMPTS),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).tolist()
    )


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    scores: torch.Tensor = model(PROMPTS, use_cache=False).logits
    return scores


def without_layers(model: Any, container: str, removed: tuple[int, ...]) -> Any:
    """Let layers pass on what they get. Nothing is renumbered, so nothing can be misnumbered."""

    def pass_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        if hasattr(module, "pre_ln"):  # RWKV's first layer norms the embeddings
            before = module.pre_ln(before)
        return (before, *output[1:]) if isinstance(output, tuple | list) else before

    layers = model.get_submodule(container)
    for layer in removed:
        layers[layer].register_forward_hook(pass_on, with_kwargs=True)
    return model
