"""Healing: against the recipe written out, on text that it never saw, and after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pruning.quality import measure_quality
from pruning.repair import (
    Healing,
    HealingStep,
    RepairError,
    RepairMaps,
    fit_repair,
    heal,
    split_windows,
)
from pruning.repair.distillation import EVALUATE_EVERY, PATIENCE, divergence
from pruning.repair.healing import LEARNING_RATE
from tests.architectures import ARCHITECTURES, Architecture, make_model
from tests.conftest import data_path

WINDOW = 128
SKIPPED = (2, 3)


@pytest.fixture(scope="module")
def model(stories_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:100]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    return [
        torch.tensor(tokenizer(text, truncation=True, max_length=WINDOW).input_ids)
        for text in texts
    ]


@pytest.fixture(scope="module")
def closed_form(model: Any, windows: list[torch.Tensor]) -> RepairMaps:
    return fit_repair(
        model, windows[:40], model_fingerprint="sha256:aa", text_fingerprint="sha256:bb"
    )


def healed(
    model: Any, windows: list[torch.Tensor], closed_form: RepairMaps | None, **options: Any
) -> RepairMaps:
    given: dict[str, Any] = {
        "model_fingerprint": "sha256:aa",
        "text_fingerprint": "sha256:cc",
        "started_from": None if closed_form is None else "sha256:closed",
        "steps": 60,
    } | options
    return heal(model, windows, given.pop("skipped", SKIPPED), closed_form, **given)


def weights(maps: RepairMaps) -> dict[int, list[list[float]]]:
    return {layer: m.weight.tolist() for layer, m in maps.layers.items()}


def test_text_it_never_saw_is_predicted_better(
    model: Any, windows: list[torch.Tensor], closed_form: RepairMaps
) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps: list[HealingStep] = []
    maps = healed(model, windows[:60], closed_form, on_step=steps.append)
    assert [step.step for step in steps] == list(range(61))
    looks = {step.step: step.held_out_loss for step in steps if step.held_out_loss is not None}
    assert list(looks) == [0, 20, 40, 60]
    assert maps.healing == Healing(
        SKIPPED, "sha256:closed", 60, 60, 0, looks[0], min(looks.values())
    )
    assert maps.healing.loss < 0.9 * maps.healing.first_loss
    assert maps.num_tokens == sum(map(len, split_windows(windows[:60])[0]))
    held_out = windows[60:]
    closed, trained = (
        measure_quality(model, held_out, [SKIPPED], stand_ins=of.layers)[0]
        for of in (closed_form, maps)
    )
    assert trained.perplexity < 0.95 * closed.perplexity
    assert trained.kl_nats is not None
    assert closed.kl_nats is not None
    assert trained.kl_nats < 0.9 * closed.kl_nats
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_a_plain_skip_can_be_healed(model: Any, windows: list[torch.Tensor]) -> None:
    maps = healed(model, windows[:60], None)
    assert maps.healing is not None
    assert maps.healing.started_from is None
    assert maps.healing.loss < 0.8 * maps.healing.first_loss


def test_steps_are_those_of_the_recipe(
    model: Any, windows: list[torch.Tensor], closed_form: RepairMaps
) -> None:
    """Eight steps, written out for this model alone, with autograd through the whole loss."""
    fit, _ = split_windows(windows[:16])
    maps = healed(model, windows[:16], closed_form, steps=8)
    decoder = model.model
    position = torch.arange(WINDOW)[None]
    rotary = decoder.rotary_emb(decoder.embed_tokens(fit[0])[None], position)

    def logprobs(window: torch.Tensor, stand_ins: dict[int, torch.Tensor]) -> torch.Tensor:
        stream = decoder.embed_tokens(window)[None]
        for layer, module in enumerate(decoder.layers):
            if layer in stand_ins:
                stream = stream + stream @ stand_ins[layer]
            else:
                stream = module(stream, position_ids=position, position_embeddings=rotary)
        found: torch.Tensor = model.lm_head(decoder.norm(stream))[0].log_softmax(-1)
        return found

    # Which order the windows come in is up to the seed; each comes once before any comes twice.
    order = list(range(len(fit)))
    random.Random("0 0").shuffle(order)
    parameters = {
        layer: torch.nn.Parameter(closed_form.layers[layer].weight.clone()) for layer in SKIPPED
    }
    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for number in order[:8]:
        with torch.no_grad():
            target = logprobs(fit[number], {})
        loss = torch.nn.functional.kl_div(
            logprobs(fit[number], dict(parameters)), target, log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for layer, parameter in parameters.items():
        first = closed_form.layers[layer].weight
        difference = (maps.layers[layer].weight - parameter).norm()
        assert difference < 0.01 * (parameter - first).norm(), layer


def test_the_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 30, generator=generator).requires_grad_()
    target = torch.randn(50, 30, generator=generator)
    target[:, 3] = -torch.inf
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target.softmax(-1), reduction="batchmean"
    )
    expected.backward()
    loss, gradient = divergence(logits.detach(), target)
    assert logits.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.allclose(gradient, logits.grad, atol=1e-7)


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.pruning.repair import test_healing as tests
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
windows = torch.load(sys.argv[2])

def on_step(step):
    if step.step == 27:
        os.kill(os.getpid(), signal.SIGKILL)

tests.healed(model, windows, None, steps=40, checkpoint=Path(sys.argv[3]), on_step=on_step)
"""


def test_a_killed_training_goes_on_and_ends_the_same(
    model: Any, stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    whole = healed(model, windows[:30], None, steps=40)
    torch.save(windows[:30], tmp_path / "windows")
    state = tmp_path / "state.safetensors"
    arguments = [stories_model, tmp_path / "windows", state, torch.get_num_threads()]
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, arguments)], env=os.environ, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert state.exists()
    steps: list[HealingStep] = []
    resumed = healed(model, windows[:30], None, steps=40, checkpoint=state, on_step=steps.append)
    assert [step.step for step in steps] == list(range(20, 41)), "it goes on from the last save"
    assert resumed.healing == whole.healing
    assert weights(resumed) == weights(whole)
    assert not state.exists()


def test_the_state_of_another_training_is_not_used(
    model: Any, windows: list[torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: HealingStep) -> None:
        if step.step == 20:
            raise Interrupted

    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        healed(model, windows[:30], None, steps=40, checkpoint=state, on_step=interrupt)
    kept = state.read_bytes()
    steps: list[HealingStep] = []
    other = healed(
        model, windows[:30], None, steps=25, seed=1, checkpoint=state, on_step=steps.append
    )
    assert steps[0].step == 0
    assert "healing begins anew" in caplog.text
    assert "the state of another training" in caplog.text
    assert weights(other) != weights(healed(model, windows[:30], None, steps=25))
    caplog.clear()
    state.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    steps.clear()
    healed(model, windows[:30], None, steps=40, checkpoint=state, on_step=steps.append)
    assert steps[0].step == 0
    assert "sha256: its tensors are not what was written" in caplog.text


def test_it_ends_early_without_gain(
    model: Any, windows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruning.repair.healing.LEARNING_RATE", 10.0)
    maps = healed(model, windows[:30], None, steps=1000)
    assert maps.healing is not None
    assert maps.healing.num_steps_taken == EVALUATE_EVERY * PATIENCE
    assert maps.healing.loss == maps.healing.first_loss
    assert not any(m.weight.any() for m in maps.layers.values()), "the maps of the beginning"


def test_a_training_that_gives_no_numbers_is_refused(
    stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(
        RepairError, match="healing: the loss on held-out text after 0 steps is not a finite number"
    ):
        healed(model, windows[:30], None, checkpoint=tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_a_step_that_gives_no_numbers_is_refused(
    model: Any, windows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruning.repair.healing.LEARNING_RATE", 1e30)
    with pytest.raises(RepairError, match=r"healing: the .* of .*step [2-9].* is not .*finite"):
        healed(model, windows[:30], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, allowed: 1 or more"),
        ({"skipped": ()}, "skipped: got no layers, allowed: one or more"),
        ({"windows": 1}, "text: got 1 text windows, allowed: 2 or more"),
        ({"windows": 4}, "text: got 384 tokens to train on, allowed: 1024 or more"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: Any, windows: list[torch.Tensor], options: dict[str, Any], message: str
) -> None:
    count = options.pop("windows", 30)
    with pytest.raises(RepairError, match=message):
        healed(model, windows[:count], None, **options)


def test_maps_that_do_not_fit_are_refused(
    model: Any, windows: list[torch.Tensor], closed_form: RepairMaps
) -> None:
    fewer = replace(closed_form, layers={2: closed_form.layers[2]})
    with pytest.raises(RepairError, match="closed_form: there is no map of layer 3"):
        healed(model, windows[:30], fewer)
    with pytest.raises(ValueError, match="skipped: got layer 5, allowed: 0 to 4"):
        healed(model, windows[:30], None, skipped=(2, 5))
    with pytest.raises(RepairError, match=r"healing.skipped: got \[2, 3\], allowed: \[2\]"):
        replace(fewer, healing=Healing(SKIPPED, None, 1, 1, 0, 1.0, 1.0))


def test_the_layers_that_maps_serve() -> None:
    healing = Healing(SKIPPED, None, 1, 1, 0, 1.0, 1.0)
    assert healing.serves(SKIPPED, SKIPPED)
    assert healing.serves(SKIPPED, ())
    assert healing.serves((), SKIPPED)
    assert not healing.serves((), ())
    assert not healing.serves((2,), SKIPPED)
    assert not healing.serves((2,), (2,))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_every_architecture(architecture: Architecture) -> None:
    model = make_model(architecture)
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 96, (48,), generator=generator) for _ in range(26)]
    maps = healed(model, windows, None, skipped=(1, 4), steps=20)
    assert maps.healing is not None
    assert maps.healing.loss < maps.healing.first_loss
