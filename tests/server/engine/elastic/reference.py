"""Expected tokens with layers left out, from plain transformers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning.decoder import StandIn
from pruning.metrics import DensePass
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
    stand_ins: Mapping[int, StandIn] | None = None,
) -> torch.Tensor:
    """Return logits [num_tokens, vocab_size] where each token skips the layers of its kind.

    No cache: every layer is run on all tokens, so that all of them have keys and values there,
    and its output is kept for those that run it. The others keep what they had, or get what
    ``stand_ins`` make of it.
    """
    stand_ins = {} if stand_ins is None else stand_ins
    is_context = (torch.arange(len(token_ids)) < num_context)[None, :, None]

    def hook(index: int) -> Callable[..., torch.Tensor]:
        runs = torch.where(
            is_context,
            torch.tensor(index not in layers.prefill_skips),
            torch.tensor(index not in layers.decode_skips),
        )
        stand_in = stand_ins.get(index, _unchanged)
        return lambda layer, args, output: torch.where(runs, output, stand_in(args[0]))

    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            hooks.callback(layer.register_forward_hook(hook(index)).remove)
        logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def _unchanged(states: torch.Tensor) -> torch.Tensor:
    return states


def generate_with_skips(
    model: Any,
    prompt_ids: Sequence[int],
    num_tokens: int,
    layers: LayerSelection,
    stand_ins: Mapping[int, StandIn] | None = None,
) -> list[int]:
    """Return greedy tokens where prompt and generated tokens may skip different layers."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        logits = logits_with_skips(model, ids, len(prompt_ids), layers, stand_ins)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt_ids) :]


@torch.inference_mode()
def check_dense_pass(measured: DensePass, model: Any, windows: Sequence[Sequence[int]]) -> None:
    """Compare what was measured with the definitions, one token and one pair at a time."""
    streams = [_streams(model, window) for window in windows]
    num_layers = len(streams[0]) - 1
    for layer in range(num_layers):
        influences, magnitudes, norms = [], [], []
        for of_window in streams:
            for x, y in zip(of_window[layer], of_window[layer + 1], strict=True):
                influences.append(1 - float(x @ y / x.norm() / y.norm()))
                magnitudes.append(float((y - x).norm() / y.norm()))
                norms.append(float(y.norm()))
        for found, expected, error in (
            (measured.block_influence.scores, influences, 1e-5),
            (measured.relative_magnitude.means, magnitudes, 1e-5),
            (measured.norm.means, norms, 1e-4 * max(norms)),
        ):
            assert found[layer] == pytest.approx(sum(expected) / len(expected), abs=error), layer
    assert measured.num_texts == len(windows)
    assert measured.angular_distances is not None
    for first, second in itertools.product(range(num_layers + 1), repeat=2):
        angles = []
        for of_window in streams:
            x, y = of_window[first][-1], of_window[second][-1]
            cosine = max(-1.0, min(1.0, float(x @ y / x.norm() / y.norm())))
            angles.append(math.acos(cosine) / math.pi)
        # The arc cosine is steep where two streams are nearly one.
        expected_angle = 0.0 if first == second else sum(angles) / len(angles)
        assert measured.angular_distances[first][second] == pytest.approx(
            expected_angle, abs=1e-4
        ), (first, second)


def _streams(model: Any, window: Sequence[int]) -> list[torch.Tensor]:
    """Return the stream into every layer and out of the last, float64 [num_tokens, hidden]."""
    norm, model.model.norm = model.model.norm, torch.nn.Identity()
    try:
        states = model(torch.tensor([list(window)]), output_hidden_states=True).hidden_states
    finally:
        model.model.norm = norm
    return [state[0].double() for state in states]
