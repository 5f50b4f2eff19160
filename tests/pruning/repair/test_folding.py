"""Repair that is folded into a checkpoint, against hooks that apply the same maps."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pruning.decoder import without_layers
from pruning.repair import RepairError
from pruning.repair.folding import (
    Fold,
    FoldedRepair,
    check_foldable,
    fit_folds,
    folded,
    gaps,
)
from pruning.surgery import export_checkpoint
from tests.architectures import ARCHITECTURES, SIZES, Architecture, hf, make_checkpoint
from tests.conftest import data_path
from tests.pruning.surgery.exporting import plan_of
from tests.server.engine.elastic import reference

NUM_TOKENS = 32


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [torch.tensor(tokenizer(story).input_ids[:128]) for story in stories[:40]]


def repair_of(folds: tuple[Fold, ...]) -> FoldedRepair:
    return FoldedRepair(folds, 1000, "sha256:text", 4.5, 12.25, 8.125, 500)


@torch.inference_mode()
def logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(window[None], use_cache=False).logits
    return result


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ((), []),
        ((2, 3), [(2, 3)]),
        ((5, 1, 2, 7), [(1, 2), (5,), (7,)]),
        ((0, 1, 3), [(3,)]),
    ],
)
def test_gaps(removed: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    assert gaps(removed) == expected


@pytest.mark.parametrize("removed", [(2,), (2, 3), (1, 3), (0, 2)])
def test_the_checkpoint_equals_hooks_with_the_same_maps(
    dense: Any,
    stories_model: Path,
    windows: list[torch.Tensor],
    tmp_path: Path,
    removed: tuple[int, ...],
) -> None:
    folds = fit_folds(dense, windows, removed)
    assert [fold.removed for fold in folds] == gaps(removed)
    export_checkpoint(
        stories_model,
        tmp_path / "out",
        plan_of(stories_model, removed),
        5 - len(removed),
        repair=repair_of(folds),
    )
    exported = reference.load(tmp_path / "out")
    export_checkpoint(
        stories_model, tmp_path / "plain", plan_of(stories_model, removed), 5 - len(removed)
    )
    plain = reference.load(tmp_path / "plain")
    for window in windows[:6]:
        prompt = window[:20]
        with ExitStack() as hooks:
            hooks.enter_context(without_layers(dense.model.layers, removed))
            hooks.enter_context(folded(dense, folds))
            expected = logits(dense, prompt)
            tokens = reference.generate(dense, prompt.tolist(), NUM_TOKENS)
        assert (logits(exported, prompt) - expected).abs().max() < 1e-4
        assert (logits(plain, prompt) - expected).abs().max() > 0.1
        assert reference.generate(exported, prompt.tolist(), NUM_TOKENS) == tokens
    original = load_file(stories_model / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    changed = {
        name
        for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items()
        if not torch.equal(tensor, written[name])
    }
    assert len(changed) == len(folds)
    assert all(name.endswith("mlp.down_proj.weight") for name in changed)
    assert {tensor.dtype for tensor in written.values()} == {
        tensor.dtype for tensor in original.values()
    }


def test_the_fit_is_that_of_a_direct_computation(dense: Any, windows: list[torch.Tensor]) -> None:
    """On states that hooks have kept, with the ridge that was chosen."""
    (fold,) = fit_folds(dense, windows, (2, 3))
    kept: dict[str, list[torch.Tensor]] = {"added": [], "left": [], "behind": []}
    layers = dense.model.layers

    def keeping(name: str) -> Any:
        return lambda module, args, output: kept[name].append(output[0].double())

    with ExitStack() as hooks, torch.inference_mode():
        for module, name in (
            (layers[1].mlp, "added"),
            (layers[1], "left"),
            (layers[3], "behind"),
        ):
            hooks.callback(module.register_forward_hook(keeping(name)).remove)
        for number, window in enumerate(windows, 1):
            if number % 8:
                dense(window[None], use_cache=False)
    added, left, behind = (torch.cat(kept[name]) for name in ("added", "left", "behind"))
    gram = added.T @ added
    ridge = fold.ridge * gram.diagonal().mean()
    expected = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), added.T @ (behind - left))
    assert fold.layer == 1
    assert (fold.weight - expected).norm() < 1e-4 * expected.norm()
    assert 0 < fold.unexplained < 1


def test_the_model_card_says_what_was_folded(
    dense: Any, stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    folds = fit_folds(dense, windows, (2, 3))
    export_checkpoint(
        stories_model, tmp_path / "out", plan_of(stories_model, (2, 3)), 3, repair=repair_of(folds)
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| 1 | 1 | 2, 3 | {folds[0].unexplained:.3f} |" in card
    assert (
        "Perplexity on 500 tokens of held-out text: 8.12; 12.25 without these maps,\n4.50" in card
    )
    assert "the other weights, apart from those below, are unchanged" in card


BIASED = Architecture("biased", "LlamaForCausalLM", lambda: hf.LlamaConfig(**SIZES, mlp_bias=True))


def is_foldable(architecture: Architecture) -> bool:
    try:
        check_foldable(architecture.config().to_dict())
    except RepairError:
        return False
    return True


def test_the_families_are_these() -> None:
    assert {str(each) for each in ARCHITECTURES if is_foldable(each)} == {
        "Llama",
        "Mistral",
        "Qwen2",
        "Qwen2 with windows in some layers",
        "Qwen3",
        "Phi-3",
        "Gemma",
    }


@pytest.mark.parametrize("architecture", [*filter(is_foldable, ARCHITECTURES), BIASED], ids=str)
def test_what_a_map_adds_reaches_the_stream_as_it_is(
    architecture: Architecture, tmp_path: Path
) -> None:
    make_checkpoint(architecture, tmp_path / "model")
    dense = reference.load(tmp_path / "model")
    hidden = dense.config.hidden_size
    torch.manual_seed(0)
    fold = Fold(1, (2,), 0.1 * torch.randn(hidden, hidden), 1.0, 0.5)
    states: dict[str, list[torch.Tensor]] = {"added": [], "left": []}

    def keeping(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    window = torch.arange(3, 13)
    layer = dense.model.layers[1]
    with ExitStack() as hooks:
        hooks.callback(layer.mlp.down_proj.register_forward_hook(keeping("added")).remove)
        hooks.callback(layer.register_forward_hook(keeping("left")).remove)
        logits(dense, window)
        with folded(dense, (fold,)):
            logits(dense, window)
    added, (before, after) = states["added"][0], states["left"]
    torch.testing.assert_close(after - before, added @ fold.weight, rtol=1e-3, atol=1e-4)

    export_checkpoint(
        tmp_path / "model",
        tmp_path / "out",
        plan_of(tmp_path / "model", (2,)),
        dense.config.num_hidden_layers - 1,
        repair=repair_of((fold,)),
    )
    with without_layers(dense.model.layers, (2,)), folded(dense, (fold,)):
        expected = logits(dense, window)
    exported = logits(reference.load(tmp_path / "out"), window)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)


def test_maps_of_another_depth_are_refused(
    dense: Any, stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    folds = fit_folds(dense, windows, (2,))
    with pytest.raises(RepairError, match=r"repair: is for the gaps \[\(2,\)\], allowed: \[\(2, 3"):
        export_checkpoint(
            stories_model,
            tmp_path / "out",
            plan_of(stories_model, (2, 3)),
            3,
            repair=repair_of(folds),
        )
    assert not (tmp_path / "out").exists()


def test_a_map_that_does_not_fit_the_type_is_refused() -> None:
    fold = Fold(0, (1,), torch.full((4, 4), 1e30), 1.0, 0.5)
    with pytest.raises(RepairError, match=r"layer 0: its map does not fit into torch\.float16"):
        fold.projection(torch.ones(4, 8, dtype=torch.float16))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"model_type": "gemma2"}, "a norm follows its MLPs"),
        ({"model_type": "gemma3_text"}, "a norm follows its MLPs"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "it has experts"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "it has experts"),
        ({"model_type": "gpt_neox"}, "it is not known to add the product with mlp.down_proj"),
        ({}, "of type None: it is not known"),
    ],
)
def test_models_that_nothing_can_be_folded_into(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(RepairError, match=f"repair: cannot be folded into a model .*{reason}"):
        check_foldable(config)
    check_foldable({"model_type": "qwen3", "num_experts": None})


def test_too_little_text_is_refused(dense: Any) -> None:
    with pytest.raises(RepairError, match="text: got 6 tokens to fit repair on, allowed: 128"):
        fit_folds(dense, [torch.arange(1, 7), torch.arange(1, 7)], (2,))
