from typing import Any

from transformers import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    """``position_embedding`` is rope, as in the 7B model, or alibi, as in the 13B model."""

    model_type = "baichuan"

    def __init__(
        self,
        vocab_size: int = 96,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 64,
        rms_norm_eps: float = 1e-6,
        position_embedding: str = "rope",
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.position_embedding = position_embedding
        super().__init__(**{"tie_word_embeddings": False, **more})
