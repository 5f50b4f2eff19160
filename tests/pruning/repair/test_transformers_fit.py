"""Repair of a real model: against the mechanism written out, and on text that it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.importance import measure_block_influence
from pruning.quality import measure_quality
from pruning.repair import RepairError, RepairMaps, fit_repair, split_windows
from tests.conftest import data_path

WINDOW = 128


@pytest.fixture(scope="module")
def model(stories_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:80]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    return [
        torch.tensor(tokenizer(text, truncation=True, max_length=WINDOW).input_ids)
        for text in texts
    ]


def fitted(model: Any, windows: list[torch.Tensor], **options: Any) -> RepairMaps:
    return fit_repair(
        model, windows, model_fingerprint="sha256:aa", text_fingerprint="sha256:bb", **options
    )


@pytest.fixture(scope="module")
def maps(model: Any, windows: list[torch.Tensor]) -> RepairMaps:
    return fitted(model, windows[:40])


def test_maps_are_those_of_the_normal_equations(
    model: Any, windows: list[torch.Tensor], maps: RepairMaps
) -> None:
    fit, _ = split_windows(windows[:40])
    assert maps.num_tokens == sum(map(len, fit)) == 35 * WINDOW
    decoder = model.model
    position = torch.arange(WINDOW)[None]
    with torch.inference_mode():
        stream = decoder.embed_tokens(torch.stack(fit))
        rotary = decoder.rotary_emb(stream[:1], position)
        for layer, module in enumerate(decoder.layers):
            after = module(stream, position_ids=position, position_embeddings=rotary)
            x, added = stream.flatten(0, 1).double(), (after - stream).flatten(0, 1).double()
            gram = x.T @ x
            gram += maps.layers[layer].ridge * gram.diagonal().mean() * torch.eye(len(gram))
            expected = torch.linalg.solve(gram, x.T @ added)
            difference = (x @ (maps.layers[layer].weight.double() - expected)).norm()
            assert difference < 1e-4 * (x @ expected).norm(), layer
            stream = after


def test_perplexity_on_text_it_never_saw_falls(
    model: Any, windows: list[torch.Tensor], maps: RepairMaps
) -> None:
    influence = measure_block_influence(model, [torch.stack(windows[:40])])
    order = sorted(range(5), key=influence.scores.__getitem__)
    selections = [order[:count] for count in (1, 2, 3)]
    held_out = windows[40:]
    cut = measure_quality(model, held_out, selections)
    repaired = measure_quality(model, held_out, selections, stand_ins=maps.layers)
    for without, with_repair in zip(cut, repaired, strict=True):
        assert with_repair.perplexity < 0.9 * without.perplexity
        assert with_repair.kl_nats is not None
        assert without.kl_nats is not None
        assert with_repair.kl_nats < without.kl_nats
    [dense] = measure_quality(model, held_out, [()], stand_ins=maps.layers)
    assert dense.kl_nats == 0, "nothing is repaired where nothing is skipped"


def test_groups_of_layers_fit_the_same(
    model: Any, windows: list[torch.Tensor], maps: RepairMaps
) -> None:
    done: list[tuple[int, int]] = []
    grouped = fitted(
        model, windows[:40], group_size=2, on_fitted=lambda *counts: done.append(counts)
    )
    assert done == [(count, 5) for count in range(1, 6)]
    for layer in range(5):
        assert torch.equal(grouped.layers[layer].weight, maps.layers[layer].weight)


def test_too_little_text_is_refused(model: Any, windows: list[torch.Tensor]) -> None:
    with pytest.raises(RepairError, match="text: got 1 text windows, allowed: 2 or more"):
        fitted(model, windows[:1])
    with pytest.raises(RepairError, match="text: got 100 tokens to fit repair on, allowed: 128"):
        fitted(model, [window[:100] for window in windows[:2]])


def test_a_damaged_layer_is_named(stories_model: Path, windows: list[torch.Tensor]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(RepairError, match="layer 3: the fit of its repair is not finite"):
        fitted(model, windows[:8])
