"""Layers that are merged into others, against the paper's formula applied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pruning.collapse import (
    Collapse,
    CollapsedModel,
    CollapseError,
    check_mergeable,
    collapse_layers,
)
from pruning.decoder import without_layers
from pruning.surgery import SurgeryError, export_checkpoint
from tests.conftest import data_path
from tests.pruning.surgery.conftest import one_thread
from tests.pruning.surgery.exporting import made_up, plan_of
from tests.server.engine.elastic import reference

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [torch.tensor(tokenizer(story).input_ids[:64]) for story in stories[:4]]


def model_of(collapse: Collapse) -> CollapsedModel:
    return CollapsedModel(collapse, "sha256:text", 4.5, 12.25, 8.125, 500)


def merge_by_hand(model: Any, into: int, taken: tuple[int, ...]) -> None:
    """W_l* = W_l + sum of (W_(l+k) - W_l), with the weights as they are now."""
    layers = model.model.layers
    state = {name: weight.clone() for name, weight in layers[into].state_dict().items()}
    for name in state:
        merged = state[name].clone()
        for other in taken:
            merged += layers[other].state_dict()[name] - state[name]
        layers[into].state_dict()[name].copy_(merged)


@torch.inference_mode()
def last_states(model: Any, window: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.model(window[None], use_cache=False).last_hidden_state[0]
    return found


@pytest.mark.parametrize("depth", [4, 3, 1])
def test_the_checkpoint_equals_layers_merged_by_hand(
    stories_model: Path, windows: list[torch.Tensor], tmp_path: Path, depth: int
) -> None:
    model = reference.load(stories_model)
    collapse = collapse_layers(model, windows, depth)
    assert len(collapse.layers) == depth
    plan = plan_of(stories_model).removing_first(collapse.removed)
    assert plan.skipped(depth) == collapse.removed
    export_checkpoint(stories_model, tmp_path / "out", plan, depth, collapse=model_of(collapse))
    exported = reference.load(tmp_path / "out")
    by_hand = reference.load(stories_model)
    originals = [
        {name: weight.double() for name, weight in layer.state_dict().items()}
        for layer in by_hand.model.layers
    ]
    for layer, factors in collapse.layers.items():
        assert sum(factors.values()) == pytest.approx(1)
        assert min(factors) == layer, "later layers are merged into earlier ones"
        for name, weight in by_hand.model.layers[layer].state_dict().items():
            weight.copy_(sum(f * originals[i][name] for i, f in factors.items()))
    prompt = windows[0][:16]
    with without_layers(by_hand.model.layers, collapse.removed):
        expected = reference.generate(by_hand, prompt.tolist(), 16)
        states = [last_states(by_hand, window) for window in windows]
    assert reference.generate(exported, prompt.tolist(), 16) == expected
    dense = reference.load(stories_model)
    cosines = [
        torch.cosine_similarity(merged, last_states(dense, window), dim=-1)
        for merged, window in zip(states, windows, strict=True)
    ]
    for found, window in zip(states, windows, strict=True):
        torch.testing.assert_close(last_states(exported, window), found, rtol=1e-3, atol=1e-3)
    assert collapse.similarity == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-3)
    assert collapse.similarity > collapse.threshold
    assert collapse.num_tokens == sum(map(len, windows))


def test_one_merge_is_that_of_the_formula(stories_model: Path, windows: list[torch.Tensor]) -> None:
    """With five layers and the depth 2, one merge of three is enough, wherever it is accepted."""
    model = reference.load(stories_model)
    tried: list[tuple[int, int]] = []
    collapse = collapse_layers(
        model, windows, 2, on_tried=lambda done, total: tried.append((done, total))
    )
    assert tried[-1] == (3, 3)
    ((into, taken),) = collapse.merged.items()
    assert taken == (into + 1, into + 2, into + 3)
    assert collapse.layers[into] == {into: -2.0} | dict.fromkeys(taken, 1.0)
    by_hand = reference.load(stories_model)
    merge_by_hand(by_hand, into, taken)
    for name, weight in by_hand.model.layers[into].state_dict().items():
        torch.testing.assert_close(model.model.layers[into].state_dict()[name], weight)


def test_all_layers_leave_the_model_as_it_is(
    stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    collapse = collapse_layers(reference.load(stories_model), windows, 5)
    assert (collapse.removed, collapse.merged, collapse.similarity) == ((), {}, 1.0)
    export_checkpoint(
        stories_model, tmp_path / "out", plan_of(stories_model), 5, collapse=model_of(collapse)
    )
    before, after = (
        load_file(directory / "model.safetensors")
        for directory in (stories_model, tmp_path / "out")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "LaCo" not in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_says_what_was_merged(stories_model: Path, tmp_path: Path) -> None:
    layers = {0: {0: 1.0}, 1: {1: -1.0, 2: 1.0, 3: 1.0}, 4: {4: 1.0}}
    collapse = Collapse(5, layers, 0.875, 0.75, 321)
    plan = plan_of(stories_model).removing_first((2, 3))
    export_checkpoint(stories_model, tmp_path / "out", plan, 3, collapse=model_of(collapse))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1 | 1 | 2, 3 |" in card
    assert "on 321 tokens,\nwas above a threshold, in the end 0.75; it is\n0.875 now." in card
    assert "8.12; 12.25 without the merges,\n4.50 with all layers" in card
    assert "These scores did not choose the removed layers here" in card
    name = "model.layers.{}.mlp.up_proj.weight"
    source, written = (
        load_file(directory / "model.safetensors")
        for directory in (stories_model, tmp_path / "out")
    )
    one, two, three = (source[name.format(layer)] for layer in (1, 2, 3))
    torch.testing.assert_close(written[name.format(1)], two + three - one)
    assert torch.equal(written[name.format(2)], source[name.format(4)])


def test_what_cannot_be_merged_is_refused(
    stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    model = reference.load(stories_model)
    with pytest.raises(ValueError, match="depth: got 6, allowed: 1 to 5"):
        collapse_layers(model, windows, 6)
    with pytest.raises(CollapseError, match="text: got no tokens"):
        collapse_layers(model, [], 3)
    mlp = model.model.layers[3].mlp
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight[:-2].clone())
    with pytest.raises(CollapseError, match=r"mlp\.up_proj\.weight has the shape \[\d+, 64\] in "):
        collapse_layers(model, windows, 3)
    layers = {0: {0: 1.0}, 1: {1: 0.0, 2: 1.0}, 3: {3: 1.0}}
    merged = model_of(Collapse(4, layers, 0.5, 0.25, 9))
    kinds: dict[str, tuple[torch.Tensor, str]] = {
        "shapes": (torch.zeros(3), "is F32 of the shape \\[3\\], allowed: F32 of the shape"),
        "types": (torch.zeros(2).half(), "is F16 of the shape"),
        "numbers": (torch.zeros(2, dtype=torch.int32), "is I32 of the shape"),
    }
    for kind, (odd, problem) in kinds.items():
        content = {f"model.layers.{layer}.w": torch.zeros(2) for layer in range(4)}
        source = made_up(tmp_path / kind, content | {"model.layers.2.w": odd})
        plan = plan_of(source, (2,))
        with pytest.raises(SurgeryError, match=f"layers cannot be merged: .*{problem}"):
            export_checkpoint(source, tmp_path / "out", plan, 3, collapse=merged)
    save_file(
        {f"model.layers.{layer}.w": torch.zeros(2, dtype=torch.int8) for layer in range(4)},
        tmp_path / "numbers" / "model.safetensors",
        {"format": "pt"},
    )
    plan = plan_of(tmp_path / "numbers", (2,))
    with pytest.raises(SurgeryError, match="is of type I8, allowed: F32, F16, BF16"):
        export_checkpoint(tmp_path / "numbers", tmp_path / "out", plan, 3, collapse=merged)
    plan = plan_of(tmp_path / "numbers", (3,))
    with pytest.raises(SurgeryError, match=r"collapse: is for the layers \[2\], allowed: \[3\]"):
        export_checkpoint(tmp_path / "numbers", tmp_path / "out", plan, 3, collapse=merged)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "it has experts"),
        ({"model_type": "llava", "text_config": {"num_experts": 8}}, "it has experts"),
    ],
)
def test_models_whose_layers_are_not_merged(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CollapseError, match=f"method: laco cannot merge the layers of .*{reason}"):
        check_mergeable(config)
    check_mergeable({"model_type": "qwen3", "num_experts": None})
