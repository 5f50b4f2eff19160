"""Gated MLPs in place of skipped layers: against the formula, and on text they never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pruning.decoder import without_layers
from pruning.quality import measure_quality
from pruning.repair import RepairError
from pruning.repair.gated_mlp import equal_size, gated_stand_ins, heal_gated
from tests.conftest import data_path
from tests.pruning.surgery.conftest import one_thread
from tests.server.engine.elastic import reference

__all__ = ["one_thread"]

SKIPPED = (1, 2, 4)


@pytest.fixture(scope="module")
def model(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))[:60]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    return [torch.tensor(tokenizer(text).input_ids[:128]) for text in texts]


def test_text_they_never_saw_is_predicted_better(model: Any, windows: list[torch.Tensor]) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    mlps = heal_gated(
        model, windows[:40], SKIPPED, intermediate_size=24, model_fingerprint="m", steps=40
    )
    assert (mlps.skipped, list(mlps.weights)) == (SKIPPED, [1, 4])
    hidden = model.config.hidden_size
    assert mlps.num_parameters == 2 * 3 * 24 * hidden
    assert mlps.num_steps_taken == 40
    assert mlps.loss < 0.9 * mlps.first_loss
    (plain,) = measure_quality(model, windows[40:], [SKIPPED])
    (healed,) = measure_quality(model, windows[40:], [SKIPPED], stand_ins=mlps.stand_ins)
    assert healed.perplexity < 0.9 * plain.perplexity
    assert healed.kl_nats is not None
    assert plain.kl_nats is not None
    assert healed.kl_nats < 0.9 * plain.kl_nats
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


def test_they_are_those_of_the_formula(model: Any, windows: list[torch.Tensor]) -> None:
    """In a model that is cut by hand, with the MLP as a layer of its own."""
    hidden = model.config.hidden_size
    weight = 0.3 * torch.randn(3, 8, hidden, generator=torch.Generator().manual_seed(0))
    stand_ins = gated_stand_ins({1: weight})
    x = torch.randn(2, 5, hidden, generator=torch.Generator().manual_seed(1))
    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate, up = n @ weight[0].T, n @ weight[1].T
    expected = x + (gate * torch.sigmoid(gate) * up) @ weight[2]
    torch.testing.assert_close(stand_ins[1](x), expected)

    states: list[torch.Tensor] = []
    layers = model.model.layers
    keep = layers[3].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    inputs = layers[1].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with without_layers(layers, (1, 2), stand_ins), torch.inference_mode():
        model(windows[0][None], use_cache=False)
    keep.remove()
    inputs.remove()
    torch.testing.assert_close(states[1], stand_ins[1](states[0]))


def test_the_training_begins_with_a_plain_skip(model: Any, windows: list[torch.Tensor]) -> None:
    """And is determined by the seed."""
    found = [
        heal_gated(
            model,
            windows[:20],
            SKIPPED,
            intermediate_size=8,
            model_fingerprint="m",
            steps=1,
            seed=seed,
            learning_rate=1e-9,
        )
        for seed in (3, 3, 4)
    ]
    same = [torch.equal(found[0].weights[4], other.weights[4]) for other in found[1:]]
    assert same == [True, False]
    assert found[0].first_loss == found[2].first_loss


def test_equal_parameters() -> None:
    assert equal_size(3, 1, 64) == 64
    assert equal_size(4, 2, 576) == 384
    assert equal_size(1, 1, 2) == 1


def test_what_cannot_be_trained_is_refused(model: Any, windows: list[torch.Tensor]) -> None:
    with pytest.raises(RepairError, match="intermediate_size: got 0, allowed: 1 or more"):
        heal_gated(model, windows, SKIPPED, intermediate_size=0, model_fingerprint="m")
    with pytest.raises(RepairError, match="skipped: got no layers"):
        heal_gated(model, windows, (), intermediate_size=8, model_fingerprint="m")
    with pytest.raises(ValueError, match="skipped: got layer 5, allowed: 0 to 4"):
        heal_gated(model, windows, (5,), intermediate_size=8, model_fingerprint="m")
