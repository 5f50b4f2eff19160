"""The architectures that Fathom answers for, each with a small model of its kind.

The table in docs/architectures.md is made from them; that what they say holds is tested in
``tests/pruning/test_architectures.py``, ``tests/pruning/surgery/test_architectures.py``,
``tests/server/engine/test_architectures.py`` and ``tests/server/engine/elastic/test_families.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from server.engine.elastic.architectures import ELASTIC_ARCHITECTURES

# The classes of transformers are untyped to the type checker, or wrongly typed.
hf: Any = transformers

NUM_LAYERS = 6
# Heads of 32 are the smallest that vLLM's attention knows on CPU.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For those whose heads share the hidden size.
SHARED: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "head_dim"} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
UNGROUPED: dict[str, Any] = {k: v for k, v in SHARED.items() if k != "num_key_value_heads"}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
NO_MORE_BAICHUAN = (
    "Model architecture BaichuanForCausalLM was supported in vLLM until v0.23.0, "
    "and is not supported anymore."
)
BAICHUAN = Path(__file__).parent / "baichuan"
CODE = ("configuration_baichuan.py", "modeling_baichuan.py")


@dataclass(frozen=True)
class Architecture:
    """``layers`` and ``norm`` say where the layers and the norm after the last of them are."""

    name: str
    class_name: str
    config: Callable[[], Any]
    layers: str = "model.layers"
    norm: str = "model.norm"
    # A part of what vLLM says, where it does not run it.
    refusal: str | None = None
    has_code: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def is_elastic(self) -> bool:
        return self.class_name in ELASTIC_ARCHITECTURES and self.refusal is None


def architecture_table() -> str:
    """Return the table of docs/architectures.md and the notes below it."""
    lines = ["| Architecture | Elastic | Dedicated | Export | BI |", "|---|---|---|---|---|"]
    refused: dict[str, list[str]] = {}
    for architecture in ARCHITECTURES:
        elastic = "yes" if architecture.is_elastic else "no"
        dedicated = "yes" if architecture.refusal is None else "no"
        lines.append(f"| {architecture} | {elastic} | {dedicated} | yes | yes |")
        if architecture.refusal is not None:
            refused.setdefault(architecture.refusal, []).append(architecture.name)
    notes = [f"- {', '.join(names)}: `{message}`" for message, names in refused.items()]
    return "\n".join(
        [
            *lines,
            "",
            "What vLLM 0.32 for CPU says of architectures that it does not run:",
            "",
            *notes,
        ]
    )


def baichuan(position_embedding: str) -> Any:
    from tests.baichuan.configuration_baichuan import BaichuanConfig

    config = BaichuanConfig(position_embedding=position_embedding)
    config.architectures = ["BaichuanForCausalLM"]
    config.auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    }
    return config


ARCHITECTURES = (
    Architecture("Llama", "LlamaForCausalLM", lambda: hf.LlamaConfig(**SIZES)),
    Architecture(
        "Mistral", "MistralForCausalLM", lambda: hf.MistralConfig(**SIZES, sliding_window=8)
    ),
    Architecture("Qwen2", "Qwen2ForCausalLM", lambda: hf.Qwen2Config(**SHARED)),
    Architecture(
        "Qwen2 with windows in some layers",
        "Qwen2ForCausalLM",
        lambda: hf.Qwen2Config(
            **SHARED, use_sliding_window=True, sliding_window=8, max_window_layers=3
        ),
        refusal="Sliding window for some but all layers is not supported.",
    ),
    Architecture("Qwen3", "Qwen3ForCausalLM", lambda: hf.Qwen3Config(**SIZES)),
    Architecture(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(
            **SIZES, **EXPERTS, moe_intermediate_size=32, num_experts=4, mlp_only_layers=[1]
        ),
    ),
    Architecture(
        "Mixtral",
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    ),
    Architecture("Gemma", "GemmaForCausalLM", lambda: hf.GemmaConfig(**SIZES)),
    Architecture(
        "Gemma 2", "Gemma2ForCausalLM", lambda: hf.Gemma2Config(**SIZES, sliding_window=8)
    ),
    Architecture(
        "Gemma 3", "Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**SIZES, sliding_window=8)
    ),
    Architecture(
        "Phi", "PhiForCausalLM", lambda: hf.PhiConfig(**UNGROUPED), norm="model.final_layernorm"
    ),
    Architecture("Phi-3", "Phi3ForCausalLM", lambda: hf.Phi3Config(**SHARED)),
    Architecture(
        "OPT",
        "OPTForCausalLM",
        lambda: hf.OPTConfig(
            vocab_size=96,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        ),
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
    ),
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(
            n_layer=NUM_LAYERS, n_embd=64, n_head=2, n_positions=64, vocab_size=96
        ),
        "transformer.h",
        "transformer.ln_f",
    ),
    Architecture(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        lambda: hf.GPTNeoXConfig(**UNGROUPED),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
    ),
    Architecture(
        "Falcon",
        "FalconForCausalLM",
        lambda: hf.FalconConfig(
            vocab_size=96, hidden_size=64, num_hidden_layers=NUM_LAYERS, num_attention_heads=2
        ),
        "transformer.h",
        "transformer.ln_f",
    ),
    Architecture("StableLM", "StableLmForCausalLM", lambda: hf.StableLmConfig(**SHARED)),
    Architecture("SmolLM3", "SmolLM3ForCausalLM", lambda: hf.SmolLM3Config(**SHARED)),
    Architecture(
        "Llama 4",
        "Llama4ForCausalLM",
        lambda: hf.Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=128,
        ),
    ),
    Architecture("OLMo 2", "Olmo2ForCausalLM", lambda: hf.Olmo2Config(**SHARED)),
    Architecture("Granite", "GraniteForCausalLM", lambda: hf.GraniteConfig(**SHARED)),
    Architecture(
        "Baichuan2 with RoPE (7B)",
        "BaichuanForCausalLM",
        lambda: baichuan("rope"),
        refusal=NO_MORE_BAICHUAN,
        has_code=True,
    ),
    Architecture(
        "Baichuan2 with ALiBi (13B)",
        "BaichuanForCausalLM",
        lambda: baichuan("alibi"),
        refusal=NO_MORE_BAICHUAN,
        has_code=True,
    ),
    Architecture(
        "Mamba",
        "MambaForCausalLM",
        lambda: hf.MambaConfig(
            vocab_size=96, hidden_size=64, state_size=16, num_hidden_layers=NUM_LAYERS
        ),
        "backbone.layers",
        "backbone.norm_f",
        refusal="'_C' object has no attribute 'selective_scan_fwd'",
    ),
    Architecture(
        "Mamba 2",
        "Mamba2ForCausalLM",
        lambda: hf.Mamba2Config(
            vocab_size=96,
            hidden_size=64,
            state_size=16,
            num_hidden_layers=NUM_LAYERS,
            num_heads=4,
            head_dim=32,
            n_groups=1,
            chunk_size=8,
        ),
        "backbone.layers",
        "backbone.norm_f",
    ),
    Architecture(
        "RWKV",
        "RwkvForCausalLM",
        lambda: hf.RwkvConfig(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=NUM_LAYERS,
            context_length=64,
            rescale_every=0,
        ),
        "rwkv.blocks",
        "rwkv.ln_out",
        refusal="Model architectures ['RwkvForCausalLM'] are not supported for now.",
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def make_model(architecture: Architecture) -> Any:
    """Return a model in float32 whose weights are so large that every layer turns the stream."""
    import torch

    torch.manual_seed(0)
    config = architecture.config()
    if architecture.has_code:
        from tests.baichuan.modeling_baichuan import BaichuanForCausalLM

        model: Any = BaichuanForCausalLM(config)
    else:
        model = hf.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    for name, parameter in model.named_parameters():  # many are equal in all layers, or zero
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        # Larger biases would drown what the token says.
        std = 0.05 if name.endswith("bias") else 0.3
        torch.nn.init.normal_(parameter, mean=0.5 if is_scale else 0.0, std=std)
    with torch.no_grad():  # else tied embeddings predict the last token again, whatever follows
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.1)
    return model.eval()


def make_checkpoint(architecture: Architecture, directory: Path) -> Path:
    make_model(architecture).save_pretrained(directory)
    if architecture.has_code:
        for name in CODE:
            shutil.copy(BAICHUAN / name, directory)
    return directory
