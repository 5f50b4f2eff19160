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
from pruning.repair import GatedMlp, GatedMlps, HealingStep, RepairError, heal_gated, split_windows
from pruning.repair.gated_mlp import equal_size
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


def healed(model: Any, windows: list[torch.Tensor], **options: Any) -> GatedMlps:
    given: dict[str, Any] = {
        "intermediate_size": 8,
        "model_fingerprint": "m",
        "text_fingerprint": "t",
    } | options
    return heal_gated(model, windows, given.pop("skipped", SKIPPED), **given)


def test_text_they_never_saw_is_predicted_better(model: Any, windows: list[torch.Tensor]) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    mlps = healed(model, windows[:40], intermediate_size=24, steps=40)
    assert (mlps.healing.skipped, list(mlps.layers)) == (SKIPPED, [1, 4])
    assert mlps.runs == [(1, 2), (4,)]
    hidden = model.config.hidden_size
    assert mlps.num_parameters == 2 * 3 * 24 * hidden
    assert mlps.healing.num_steps_taken == 40
    assert mlps.healing.loss < 0.9 * mlps.healing.first_loss
    assert mlps.num_tokens == sum(map(len, split_windows(windows[:40])[0]))
    (plain,) = measure_quality(model, windows[40:], [SKIPPED])
    (after,) = measure_quality(model, windows[40:], [SKIPPED], stand_ins=mlps.layers)
    assert after.perplexity < 0.9 * plain.perplexity
    assert after.kl_nats is not None
    assert plain.kl_nats is not None
    assert after.kl_nats < 0.9 * plain.kl_nats
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


def test_they_are_those_of_the_formula(model: Any, windows: list[torch.Tensor]) -> None:
    """In a model that is cut by hand, with the MLP as a layer of its own."""
    hidden = model.config.hidden_size
    weight = 0.3 * torch.randn(3, 8, hidden, generator=torch.Generator().manual_seed(0))
    stand_ins = {1: GatedMlp(weight)}
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
        healed(model, windows[:20], steps=1, seed=seed, learning_rate=1e-9) for seed in (3, 3, 4)
    ]
    same = [torch.equal(found[0].layers[4].weight, other.layers[4].weight) for other in found[1:]]
    assert same == [True, False]
    assert found[0].healing.first_loss == found[2].healing.first_loss


def test_an_interrupted_training_goes_on_and_ends_the_same(
    model: Any, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: HealingStep) -> None:
        if step.step == 13:
            raise Interrupted

    whole = healed(model, windows[:20], steps=20)
    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        healed(model, windows[:20], steps=20, checkpoint=state, on_step=interrupt)
    steps: list[int] = []
    resumed = healed(
        model,
        windows[:20],
        steps=20,
        checkpoint=state,
        on_step=lambda step: steps.append(step.step),
    )
    assert steps == list(range(10, 21)), "it goes on from the last save"
    assert resumed.healing == whole.healing
    for layer, mlp in whole.layers.items():
        assert torch.equal(resumed.layers[layer].weight, mlp.weight)
    assert not state.exists()


def test_equal_parameters(model: Any, windows: list[torch.Tensor]) -> None:
    assert equal_size(3, 1, 64) == 64
    assert equal_size(4, 2, 576) == 384
    assert equal_size(1, 1, 2) == 1
    mlps = healed(model, windows[:20], steps=1, intermediate_size=None)
    assert mlps.intermediate_size == equal_size(3, 2, model.config.hidden_size)
    assert mlps.num_parameters == len(SKIPPED) * model.config.hidden_size**2


def test_what_cannot_be_trained_is_refused(model: Any, windows: list[torch.Tensor]) -> None:
    with pytest.raises(RepairError, match="intermediate_size: got 0, allowed: 1 or more"):
        healed(model, windows, intermediate_size=0)
    for size in (8, None):
        with pytest.raises(RepairError, match="skipped: got no layers"):
            healed(model, windows, skipped=(), intermediate_size=size)
    with pytest.raises(ValueError, match="skipped: got layer 5, allowed: 0 to 4"):
        healed(model, windows, skipped=(5,))
