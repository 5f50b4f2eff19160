"""Healed maps and gated MLPs that are kept: found for their model and layers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pruning.repair import (
    Healing,
    LayerMap,
    RepairMaps,
    load_maps,
    load_stand_ins,
    save_gated_mlps,
    save_maps,
)
from server.calibration.healed_store import HealedStore, Outcome, Training
from tests.gated_mlps import random_mlps

SKIPPED = (2, 5)
TRAINING = Training("sha256:t", "sha256:h", "sha256:c", "float32", 60, 0)


def healed(skipped: tuple[int, ...] = SKIPPED, model: str = "sha256:model") -> RepairMaps:
    return RepairMaps(
        {layer: LayerMap(torch.eye(4) * layer, 1.0, 0.5) for layer in skipped},
        num_layers=8,
        model_fingerprint=model,
        text_fingerprint="sha256:t",
        num_tokens=100,
        healing=Healing(skipped, "sha256:c", 60, 60, 0, 0.5, 0.25),
    )


@pytest.fixture
def store(tmp_path: Path) -> HealedStore:
    return HealedStore(tmp_path, "sha256:model", 8)


def test_maps_are_found_by_the_layers_they_are_for(store: HealedStore) -> None:
    assert store.find(SKIPPED) is None
    save_maps(healed(), store.path_of(SKIPPED))
    assert store.find(SKIPPED) == store.path_of(SKIPPED)
    assert store.find((2, 6)) is None


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        (healed(model="sha256:other"), "model_fingerprint: the maps are of a model with sha256:o"),
        (healed((2, 6)), "skipped: found maps [2, 6], allowed: [2, 5]"),
        (replace(healed(), healing=None), "skipped: found maps in closed form, allowed: [2, 5]"),
        (replace(healed(), num_layers=9), "num_layers: the maps are of a model with 9"),
    ],
)
def test_maps_of_others_are_not_used(
    store: HealedStore, maps: RepairMaps, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_maps(maps, store.path_of(SKIPPED))
    assert store.find(SKIPPED) is None
    assert "healed maps are not used: " in caplog.text
    assert problem in caplog.text


def test_damaged_maps_are_not_used(store: HealedStore, caplog: pytest.LogCaptureFixture) -> None:
    path = store.path_of(SKIPPED)
    save_maps(healed(), path)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.find(SKIPPED) is None
    assert f"healed maps are not used: {path}: truncated" in caplog.text


def test_what_a_training_came_to_is_remembered(store: HealedStore) -> None:
    assert store.outcome(SKIPPED, TRAINING) is None
    store.save_outcome(SKIPPED, TRAINING, Outcome("perplexity 3, before: 2"))
    assert store.outcome(SKIPPED, TRAINING) == Outcome("perplexity 3, before: 2")
    for other in (
        replace(TRAINING, steps=61),
        replace(TRAINING, seed=1),
        replace(TRAINING, tokens="x"),
        replace(TRAINING, held_out="x"),
        replace(TRAINING, started_from="x"),
        replace(TRAINING, dtype="bfloat16"),
        replace(TRAINING, kind="gated-mlp"),
    ):
        assert store.outcome(SKIPPED, other) is None
    assert store.outcome((2, 6), TRAINING) is None


def test_maps_that_are_gone_are_trained_again(store: HealedStore) -> None:
    store.save_outcome(SKIPPED, TRAINING, Outcome(""))
    assert store.outcome(SKIPPED, TRAINING) is None
    candidate = store.candidate_of(SKIPPED, TRAINING)
    save_maps(healed(), candidate)
    assert store.candidate(SKIPPED, TRAINING) == candidate
    kept = store.keep(SKIPPED, candidate)
    assert load_maps(kept).healing == healed().healing
    assert store.outcome(SKIPPED, TRAINING) == Outcome("")


def test_maps_and_mlps_of_the_same_layers_are_kept_apart(store: HealedStore) -> None:
    gated = replace(TRAINING, kind="gated-mlp", intermediate_size=8)
    mlps = random_mlps(SKIPPED, num_layers=8, hidden_size=4, model="sha256:model")
    candidate = store.candidate_of(SKIPPED, gated)
    assert candidate != store.candidate_of(SKIPPED, TRAINING)
    assert candidate != store.candidate_of(SKIPPED, replace(gated, intermediate_size=9))
    save_gated_mlps(mlps, candidate)
    assert store.candidate(SKIPPED, gated) == candidate
    save_maps(healed(), store.path_of(SKIPPED))
    kept = store.keep(SKIPPED, candidate)
    assert kept == store.path_of(SKIPPED, "gated-mlp") == store.find(SKIPPED, "gated-mlp")
    assert load_stand_ins(kept).healing == mlps.healing
    assert load_maps(store.path_of(SKIPPED)).healing == healed().healing
    store.save_outcome(SKIPPED, gated, Outcome(""))
    assert store.outcome(SKIPPED, gated) == Outcome("")
    assert store.outcome(SKIPPED, TRAINING) is None
    kept.unlink()
    assert store.outcome(SKIPPED, gated) is None, "maps are not what was trained"


def test_mlps_of_others_are_not_used(store: HealedStore, caplog: pytest.LogCaptureFixture) -> None:
    path = store.path_of(SKIPPED, "gated-mlp")
    for mlps, problem in [
        (random_mlps(SKIPPED, num_layers=8, hidden_size=4), "model_fingerprint: the MLPs are of"),
        (
            random_mlps((2, 6), num_layers=8, hidden_size=4, model="sha256:model"),
            "skipped: found MLPs [2, 6], allowed: [2, 5]",
        ),
    ]:
        save_gated_mlps(mlps, path)
        assert store.find(SKIPPED, "gated-mlp") is None
        assert f"gated MLPs are not used: {problem}" in caplog.text.replace(f"{path}: ", "")
    save_maps(healed(), path)
    assert store.find(SKIPPED, "gated-mlp") is None
    assert f"gated MLPs are not used: {path}: kind: found maps, allowed: gated-mlp" in caplog.text
