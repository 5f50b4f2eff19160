from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(
            hidden_states, hidden_states.shape[-1:], self.weight, self.epsilon
        )


class MLP(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def rotated(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    a, b = states[..., :half], states[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_index: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.layer_index = layer_index
        self.has_alibi = config.position_embedding == "alibi"
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, visible: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor:
        batch, length, hidden_size = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        total = visible.shape[-1]
        positions = torch.arange(total)
        if not self.has_alibi:
            query = rotated(query, positions[-length:])
            key = rotated(key, positions[-length:])
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if self.has_alibi:
            heads = torch.arange(1, self.num_heads + 1)
            slopes = 2.0 ** (-8.0 * heads / self.num_heads)
            scores = scores + (slopes[:, None, None] * positions).to(scores.dtype)
        scores = scores.masked_fill(~visible, -torch.inf)
        mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
        output: torch.Tensor = self.o_proj(
            mixed.transpose(1, 2).reshape(batch, length, hidden_size)
        )
        return output


class DecoderLayer(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, visible: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, Cache | None]:
        mixed = self.self_attn(self.input_layernorm(hidden_states), visible, cache)
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, cache


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"


class BaichuanModel(BaichuanPreTrainedModel):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        length = input_ids.shape[1]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        visible = torch.ones(length, seen + length, dtype=torch.bool).tril(seen)
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, visible, past_key_values)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class NormHead(nn.Module):
    """The output layer: the cosine, but for the length of the state."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden_states, functional.normalize(self.weight))


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings: nn.Embedding = self.model.embed_tokens
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
