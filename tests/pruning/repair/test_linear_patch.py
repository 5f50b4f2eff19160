"""Hadamard matrices, and patches that are made of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pruning.decoder import without_layers
from pruning.repair import RepairError
from pruning.repair.folding import FoldedRepair, FoldMethod, folded
from pruning.repair.hadamard import rotation
from pruning.repair.linear_patch import fit_linear_patches, fit_stream_patches
from pruning.surgery import export_checkpoint
from tests.conftest import data_path
from tests.pruning.surgery.conftest import one_thread
from tests.pruning.surgery.exporting import plan_of
from tests.server.engine.elastic import reference

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def windows(stories_model: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [torch.tensor(tokenizer(story).input_ids[:64]) for story in stories[:16]]


@pytest.mark.parametrize("size", [1, 2, 4, 12, 28, 36, 64, 288, 576, 896])
def test_rotations_are_orthogonal_and_flat(size: int) -> None:
    found = rotation(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5))


@pytest.mark.parametrize("size", [3, 6, 30, 92])
def test_sizes_without_a_matrix_are_refused(size: int) -> None:
    with pytest.raises(RepairError, match=f"hidden_size: got {size}, allowed: a product of sizes"):
        rotation(size)


def kept_states(dense: Any, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What layer 1's MLP adds, and the stream behind the layers 1 and 3, of some windows."""
    kept: dict[str, list[torch.Tensor]] = {"added": [], "left": [], "behind": []}
    layers = dense.model.layers

    def keeping(name: str) -> Any:
        return lambda module, args, output: kept[name].append(output[0].double())

    with ExitStack() as hooks, torch.inference_mode():
        for module, name in ((layers[1].mlp, "added"), (layers[1], "left"), (layers[3], "behind")):
            hooks.callback(module.register_forward_hook(keeping(name)).remove)
        for window in windows:
            dense(window[None], use_cache=False)
    return {name: torch.cat(states) for name, states in kept.items()}


def test_the_folded_scales_are_those_of_least_squares(
    dense: Any, windows: list[torch.Tensor]
) -> None:
    (fold,) = fit_linear_patches(dense, windows, (2, 3))
    assert (fold.layer, fold.removed) == (1, (2, 3))
    fit = [window for number, window in enumerate(windows, 1) if number % 8]
    states = kept_states(dense, fit)
    turn = rotation(dense.config.hidden_size)
    a, g = states["added"] @ turn, (states["behind"] - states["left"]) @ turn
    scales = torch.stack(
        [torch.linalg.lstsq(a[:, [j]], g[:, j]).solution[0] for j in range(len(turn))]
    )
    expected = turn @ scales.diag() @ turn.T
    torch.testing.assert_close(fold.weight, expected, rtol=1e-4, atol=1e-5)
    held_out = kept_states(dense, windows[7::8])
    gained = held_out["behind"] - held_out["left"]
    missed = held_out["added"] @ expected - gained
    assert fold.unexplained == pytest.approx(
        float(missed.square().sum() / gained.square().sum()), rel=1e-3
    )


def test_the_patches_of_the_paper_are_ratios_of_magnitudes(
    dense: Any, windows: list[torch.Tensor]
) -> None:
    patches = fit_stream_patches(dense, windows, (2, 3))
    assert list(patches) == [2]
    states = kept_states(dense, windows)
    turn = rotation(dense.config.hidden_size)
    scales = (states["behind"] @ turn).abs().mean(0) / (states["left"] @ turn).abs().mean(0)
    expected = states["left"] @ turn @ scales.diag() @ turn.T
    torch.testing.assert_close(patches[2](states["left"]), expected)
    assert list(fit_stream_patches(dense, windows, (0, 1, 4))) == [0, 4]


def test_the_checkpoint_equals_hooks_with_the_same_patches(
    dense: Any, stories_model: Path, windows: list[torch.Tensor], tmp_path: Path
) -> None:
    removed = (1, 3)
    folds = fit_linear_patches(dense, windows, removed)
    repair = FoldedRepair(
        folds, 1000, "sha256:text", 4.5, 12.25, 8.125, 500, FoldMethod.LINEAR_PATCH
    )
    plan = plan_of(stories_model, removed)
    export_checkpoint(stories_model, tmp_path / "out", plan, 3, repair=repair)
    exported = reference.load(tmp_path / "out")
    for window in windows[:3]:
        prompt = window[:20]
        with ExitStack() as hooks:
            hooks.enter_context(without_layers(dense.model.layers, removed))
            with torch.inference_mode():
                plain = dense(prompt[None], use_cache=False).logits
            hooks.enter_context(folded(dense, folds))
            with torch.inference_mode():
                expected = dense(prompt[None], use_cache=False).logits
            tokens = reference.generate(dense, prompt.tolist(), 16)
        with torch.inference_mode():
            found = exported(prompt[None], use_cache=False).logits
        assert (found - expected).abs().max() < 1e-4
        assert (found - plain).abs().max() > 0.01
        assert reference.generate(exported, prompt.tolist(), 16) == tokens
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[LinearPatch](https://arxiv.org/abs/2505.24680)" in card
    assert "ReplaceMe" not in card


def test_too_little_text_is_refused(dense: Any) -> None:
    few = [torch.arange(1, 7), torch.arange(1, 7)]
    with pytest.raises(RepairError, match="text: got 6 tokens to fit patches on, allowed: 64"):
        fit_linear_patches(dense, few, (2,))
    with pytest.raises(RepairError, match="text: got 12 tokens to fit patches on, allowed: 64"):
        fit_stream_patches(dense, few, (2,))
