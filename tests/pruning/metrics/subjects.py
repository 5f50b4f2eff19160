"""Models to rank, what is known of them by the definitions, and slow ways to compute it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pruning.metrics import Selection
from tests.conftest import data_path

Array = npt.NDArray[np.float64]


@dataclass
class Subject:
    """A model in float64, and texts of equal length as token ids [num_texts, length]."""

    model: Any
    input_ids: torch.Tensor
    # Every selection that was evaluated, in order.
    evaluated: list[Selection] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @cached_property
    def streams(self) -> list[Array]:
        """The stream into every layer and out of the last, [num_texts, length, hidden] each."""
        final_norm, self.model.model.norm = self.model.model.norm, nn.Identity()
        try:
            with torch.inference_mode():
                states = self.model(self.input_ids, output_hidden_states=True).hidden_states
        finally:
            self.model.model.norm = final_norm
        return [state.numpy() for state in states]

    @torch.inference_mode()
    def next_token_logprobs(self, skipped: Selection) -> Array:
        """Return [num_texts, length, vocabulary] of the model with its layers taken out."""
        decoder = self.model.model
        whole = decoder.layers
        decoder.layers = nn.ModuleList([m for i, m in enumerate(whole) if i not in skipped])
        decoder.config.num_hidden_layers = len(decoder.layers)
        try:
            logits = self.model(self.input_ids, use_cache=False).logits.numpy()
        finally:
            decoder.layers = whole
            decoder.config.num_hidden_layers = len(whole)
        logits = logits - logits.max(-1, keepdims=True)
        logprobs: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return logprobs

    @cached_property
    def dense_logprobs(self) -> Array:
        return self.next_token_logprobs(())

    def kl(self, skipped: Selection) -> float:
        """KL(dense || without the layers), in nats a token."""
        p, q = self.dense_logprobs, self.next_token_logprobs(skipped)
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    def evaluate(self, selections: Sequence[Selection]) -> list[float]:
        self.evaluated += selections
        return [self.kl(selection) for selection in selections]


def random_llama() -> Subject:
    torch.manual_seed(3)
    config: Any = LlamaConfig
    untyped: Any = LlamaForCausalLM
    model = untyped(
        config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
        )
    )
    model = model.double().eval()
    # Weights of very unequal scale, so that the layers differ in importance.
    for number, layer in enumerate(model.model.layers):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.06 * (1 + (5 * number) % 6))
    return Subject(model, torch.randint(1, 96, (6, 24)))


def stories(directory: Path) -> Subject:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:12]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    ids = [tokenizer(text, truncation=True, max_length=96).input_ids for text in texts]
    return Subject(model, torch.tensor(ids))
