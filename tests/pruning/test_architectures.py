from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from pruning.decoder import find_decoder
from pruning.importance import ImportanceError, measure_block_influence

# The classes of transformers are untyped to the type checker, or wrongly typed.
hf: Any = transformers

NUM_LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEWER = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

# The configuration; where the layers are; where the norm after the last of them is.
FAMILIES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (lambda: hf.LlamaConfig(**SIZES), "model.layers", "model.norm"),
    "mistral": (
        lambda: hf.MistralConfig(**SIZES, sliding_window=5),
        "model.layers",
        "model.norm",
    ),
    "qwen2": (
        lambda: hf.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2
        ),
        "model.layers",
        "model.norm",
    ),
    "qwen3": (lambda: hf.Qwen3Config(**SIZES), "model.layers", "model.norm"),
    "gemma2": (lambda: hf.Gemma2Config(**SIZES, sliding_window=5), "model.layers", "model.norm"),
    "gemma3": (
        lambda: hf.Gemma3TextConfig(**SIZES, sliding_window=5),
        "model.layers",
        "model.norm",
    ),
    "phi": (lambda: hf.PhiConfig(**FEWER), "model.layers", "model.final_layernorm"),
    "opt": (
        lambda: hf.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
    ),
    "gpt2": (
        lambda: hf.GPT2Config(
            n_layer=NUM_LAYERS, n_embd=32, n_head=4, n_positions=64, vocab_size=96
        ),
        "transformer.h",
        "transformer.ln_f",
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXConfig(**FEWER),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
    ),
    "mixtral": (
        lambda: hf.MixtralConfig(**SIZES, **MOE, num_local_experts=4),
        "model.layers",
        "model.norm",
    ),
    "qwen3-moe": (
        lambda: hf.Qwen3MoeConfig(
            **SIZES, **MOE, moe_intermediate_size=16, num_experts=4, mlp_only_layers=[1]
        ),
        "model.layers",
        "model.norm",
    ),
    "mamba": (
        lambda: hf.MambaConfig(
            vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=NUM_LAYERS
        ),
        "backbone.layers",
        "backbone.norm_f",
    ),
    # Its library halves the stream every so many layers, between them.
    "rwkv": (
        lambda: hf.RwkvConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=NUM_LAYERS,
            context_length=64,
            rescale_every=2,
        ),
        "rwkv.blocks",
        "rwkv.ln_out",
    ),
}


class AlibiAttention(nn.Module):
    """Attention of Baichuan2-13B's shape: a packed projection, a bias by distance."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.W_pack = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden_states: torch.Tensor, alibi: torch.Tensor) -> Any:
        batch, length, hidden = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=alibi)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden)), (key, value)


class CustomLayer(nn.Module):
    """A layer as checkpoints bring it along; ``style`` says how it passes the stream."""

    def __init__(self, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = AlibiAttention(hidden, num_heads=4)
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 48), nn.SiLU(), nn.Linear(48, hidden))

    def forward(self, x: torch.Tensor, alibi: torch.Tensor) -> Any:
        mixed, present = self.self_attn(self.input_layernorm(x), alibi)
        if self.style == "in place":
            x += mixed
            x += self.mlp(self.post_attention_layernorm(x))
        else:
            x = x + mixed
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x if self.style == "tensor" else (x, None, present)


class CustomDecoder(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.by_keyword = style == "keyword"
        self.embed_tokens = nn.Embedding(96, 32)
        self.layers = nn.ModuleList([CustomLayer(32, style) for _ in range(NUM_LAYERS)])
        self.norm = nn.RMSNorm(32)

    def forward(self, input_ids: torch.Tensor) -> Any:
        states = self.embed_tokens(input_ids)
        length = input_ids.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        slopes = 2.0 ** -torch.arange(1, 5)[:, None, None]
        alibi = (-slopes * distance).masked_fill(distance < 0, -torch.inf).to(states.dtype)
        for layer in self.layers:
            out = layer(alibi=alibi, x=states) if self.by_keyword else layer(states, alibi)
            states = out[0] if isinstance(out, tuple) else out
        return (self.norm(states),)


class CustomModel(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.model = CustomDecoder(style)
        self.lm_head = nn.Linear(32, 96, bias=False)

    def forward(self, input_ids: torch.Tensor) -> Any:
        raise AssertionError("the product with the output embeddings is not needed")


def with_random_weights(model: Any) -> Any:
    """Return the model in float64, its weights so large that every layer turns the stream."""
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def library_model(family: str) -> Any:
    torch.manual_seed(0)
    return with_random_weights(hf.AutoModelForCausalLM.from_config(FAMILIES[family][0]()))


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


def stream_after(model: Any, num_layers: int, paths: tuple[str, str], ids: torch.Tensor) -> Any:
    """Return the raw residual stream after some layers, by a model that has no more of them."""
    cut = copy.deepcopy(model)
    layers, norm = paths
    cut.set_submodule(layers, cut.get_submodule(layers)[:num_layers])
    cut.set_submodule(norm, nn.Identity())
    decoder = cut.get_submodule(layers.rpartition(".")[0])
    with torch.no_grad():
        return decoder(input_ids=ids)[0]


def influence(before: torch.Tensor, after: torch.Tensor) -> float:
    a, b = (states.detach().double().numpy().reshape(-1, 32) for states in (before, after))
    cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1)) / np.sqrt((b * b).sum(-1))
    return float(1 - cosines.mean())


def expected_scores(model: Any, paths: tuple[str, str], ids: torch.Tensor) -> list[float]:
    streams = [stream_after(model, n, paths, ids) for n in range(NUM_LAYERS + 1)]
    return [influence(a, b) for a, b in pairwise(streams)]


@pytest.mark.parametrize("family", FAMILIES)
def test_library_models(family: str, input_ids: torch.Tensor) -> None:
    model = library_model(family)
    _, *paths = FAMILIES[family]
    decoder = find_decoder(model)
    assert list(decoder.layers) == list(model.get_submodule(paths[0]))
    assert decoder.module is model.get_submodule(paths[0].rpartition(".")[0])

    measured = measure_block_influence(model, input_ids.chunk(3))
    assert measured.scores == pytest.approx(
        expected_scores(model, (paths[0], paths[1]), input_ids), rel=1e-10
    )
    assert measured.num_tokens == input_ids.numel()
    assert min(measured.scores) > 1e-4
    # The norm after the last layer turns the state: measured after it, the score would differ.
    normed = model.get_submodule(paths[0].rpartition(".")[0])(input_ids=input_ids)[0]
    before = stream_after(model, NUM_LAYERS - 1, (paths[0], paths[1]), input_ids)
    assert abs(influence(before, normed) - measured.scores[-1]) > 1e-3


@pytest.mark.parametrize("style", ["tensor", "tuple", "keyword", "in place"])
def test_custom_code(style: str, input_ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = with_random_weights(CustomModel(style))
    measured = measure_block_influence(model, [input_ids])
    expected = expected_scores(model, ("model.layers", "model.norm"), input_ids)
    assert measured.scores == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "mixtral", "mamba", "rwkv"])
def test_padding_on_the_right_is_not_counted(family: str, input_ids: torch.Tensor) -> None:
    model = library_model(family)
    mask = torch.ones_like(input_ids)
    mask[0, 7:] = mask[2, 3:] = 0
    alone = measure_block_influence(model, [input_ids[:1, :7], input_ids[1:2], input_ids[2:, :3]])
    together = measure_block_influence(model, [input_ids], [mask])
    assert together.num_tokens == alone.num_tokens == 7 + 12 + 3
    assert together.scores == pytest.approx(alone.scores, rel=1e-6)


def test_layers_of_a_multimodal_model_are_those_of_its_text_model() -> None:
    vision: Any = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = hf.Gemma3TextConfig(**SIZES)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    assert list(find_decoder(model).layers) == list(model.model.language_model.layers)


def test_a_model_without_known_layers_is_refused_with_what_was_looked_for() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).eval()
    names = "'layers' or 'h' or 'blocks', neither itself nor in model, transformer, backbone"
    with pytest.raises(ValueError, match=f"^model: Sequential has no module list named {names}"):
        measure_block_influence(model, [torch.ones(1, 4, dtype=torch.long)])


def test_an_encoder_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, an encoder-decoder"):
        measure_block_influence(hf.T5ForConditionalGeneration(config).eval(), [])


def test_masks_for_a_model_that_takes_none_are_refused(input_ids: torch.Tensor) -> None:
    model = CustomModel("tuple").eval()
    with pytest.raises(ValueError, match="CustomDecoder takes no attention_mask"):
        measure_block_influence(model, [input_ids], [torch.ones_like(input_ids)])


class Wrong(nn.Module):
    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.result = result

    def forward(self, states: torch.Tensor, alibi: torch.Tensor) -> Any:
        return self.result(states)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: {"states": x}, "layers: Wrong returned dict, allowed: the hidden states"),
        (lambda x: x.flatten(0, 1), "got states of shape [36, 32] for tokens of shape [3, 12]"),
    ],
)
def test_layers_that_return_something_else_are_refused(
    result: Callable[[torch.Tensor], Any], message: str, input_ids: torch.Tensor
) -> None:
    model = CustomModel("tensor")
    model.model.layers[2] = Wrong(result)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure_block_influence(model.eval(), [input_ids])
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)


def test_a_layer_that_does_not_run_is_refused(input_ids: torch.Tensor) -> None:
    model = library_model("llama")
    model.config.num_hidden_layers = NUM_LAYERS - 1
    with pytest.raises(ImportanceError, match="layer 3: measured on 0 tokens"):
        measure_block_influence(model, [input_ids])
