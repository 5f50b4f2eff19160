"""Tiny language models with their norms before or after, and their training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from bench.norms import NormsOptions

_WARM_UP_SHARE = 0.1


class TinyModel(nn.Module):
    """A language model with learned positions; ``pre_norm`` says where its layers' norms are."""

    def __init__(self, options: NormsOptions, vocab_size: int, *, pre_norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, options.hidden)
        self.positions = nn.Embedding(options.window, options.hidden)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                options.hidden,
                options.heads,
                options.intermediate,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=pre_norm,
            )
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(options.hidden)

    def streams(self, ids: torch.Tensor, skipped: int | None = None) -> list[torch.Tensor]:
        """Return the residual stream before each layer and after the last one.

        ``ids`` is [batch, length], each stream [batch, length, hidden]. The layer ``skipped``
        passes the stream on as it is.
        """
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        streams = [self.embedding(ids) + self.positions.weight[:length]]
        for number, layer in enumerate(self.layers):
            stream = streams[-1]
            if number != skipped:
                stream = layer(stream, src_mask=mask, is_causal=True)
            streams.append(stream)
        return streams

    def loss(self, windows: torch.Tensor, skipped: int | None = None) -> torch.Tensor:
        """Return the mean negative log-likelihood in nats of all tokens but the first of each."""
        last = self.streams(windows[:, :-1], skipped)[-1]
        logits = functional.linear(self.norm(last), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(model: TinyModel, tokens: torch.Tensor, options: NormsOptions) -> Iterator[int]:
    """Yield the number of steps done: 0 before the first, then after each one.

    The learning rate rises for a tenth of the steps, which post-norm models need, and then falls
    along a cosine. Both models see the same windows of ``tokens`` in the same order.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.1)
    generator = torch.Generator().manual_seed(options.seed)
    warm_up = max(1, round(_WARM_UP_SHARE * options.steps))
    yield 0
    for step in range(options.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min((step + 1) / warm_up, cosine)
        loss = model.loss(windows_of(tokens, options.batch_size, options.window, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1


@torch.no_grad()
def look(model: TinyModel, windows: torch.Tensor) -> dict[str, Any]:
    """Return the loss, and for each layer the mean over tokens of cos(stream before, after)."""
    streams = model.streams(windows[:, :-1])
    cosines = [
        float(functional.cosine_similarity(before, after, dim=-1).mean())
        for before, after in itertools.pairwise(streams)
    ]
    return {"loss": float(model.loss(windows)), "cosines": cosines}


def without_one(model: TinyModel, windows: torch.Tensor) -> dict[str, Any]:
    """Return the layer that turns the stream least, and the loss without it."""
    cosines = look(model, windows)["cosines"]
    layer = cosines.index(max(cosines))
    with torch.no_grad():
        return {"most_redundant": layer, "loss_without": float(model.loss(windows, layer))}


def tokens_of(tokenizer: Any, texts: Iterable[str], num_tokens: int) -> torch.Tensor:
    """Return the first ``num_tokens`` tokens of ``texts``, or all where there are fewer."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= num_tokens:
            break
        ids += tokenizer(text, verbose=False)["input_ids"]  # longer than its context
    return torch.tensor(ids)


def windows_of(
    tokens: torch.Tensor, number: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Return windows [number, length + 1] from random places of ``tokens``."""
    starts = torch.randint(len(tokens) - length, (number, 1), generator=generator)
    return tokens[starts + torch.arange(length + 1)]
