"""What a report's numbers are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.decoder import find_decoder, without_layers
from server.calibration.text_windows import text_windows
from server.model.demo_corpus import Part, documents


class Reference:
    """A model as transformers runs it, with nothing of what the report measures with."""

    def __init__(self, directory: Path, max_context: int | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.layers = find_decoder(self.model).layers
        self._max_context = max_context or self.model.config.max_position_embeddings
        self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def windows(self, part: Part, num_tokens: int) -> list[torch.Tensor]:
        def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
            encoded = self._tokenizer(text, add_special_tokens=special_tokens, verbose=False)
            return list(encoded.input_ids)

        windows = text_windows(
            tokenize,
            list(documents([part])),
            max_context=self._max_context,
            max_tokens=num_tokens,
            vocab_size=self.model.config.vocab_size,
        )
        return [torch.tensor([window]) for window in windows]

    @torch.inference_mode()
    def influence(self, num_tokens: int) -> list[float]:
        similarities: list[list[torch.Tensor]] = [[] for _ in self.layers]
        handles = []
        for layer, module in enumerate(self.layers):

            def hook(_: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                similarities[layer].append(cosine_similarity(before, after, dim=-1).flatten())

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for window in self.windows(Part.CALIBRATION, num_tokens):
            self.model(window)
        for handle in handles:
            handle.remove()
        return [1 - float(torch.cat(each).double().mean()) for each in similarities]

    @torch.inference_mode()
    def perplexity(self, skipped: Sequence[int], num_tokens: int) -> float:
        """Return that of the second half of each window, which the engine scores."""
        losses = []
        for window in self.windows(Part.HELD_OUT, num_tokens):
            with without_layers(self.layers, skipped):
                logits = self.model(window).logits[0]
            half = window.shape[1] // 2
            losses.append(
                cross_entropy(logits[half - 1 : -1], window[0, half:], reduction="none").double()
            )
        return math.exp(float(torch.cat(losses).mean()))
