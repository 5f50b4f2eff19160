from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.models import positional_plan
from bench.random_model import RandomModel
from pruning.checkpoint import check_checkpoint

SMALL = RandomModel(
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=1000,
    max_context=128,
)


def load(directory: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory)


def test_it_is_a_whole_checkpoint_that_runs(tmp_path: Path) -> None:
    directory = SMALL.save(tmp_path)
    check_checkpoint(directory)
    model = load(directory)
    assert model.config.num_hidden_layers == 3
    assert model.lm_head.weight.shape == (1000, 64)
    logits = model(torch.arange(10)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(directory)
    text = "Zürich, 12 °C\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 1000
    assert len({tokenizer.decode([i]) for i in range(300, 1000)}) == 700


def test_the_same_size_and_seed_give_the_same_model_once(tmp_path: Path) -> None:
    first = SMALL.save(tmp_path / "a")
    modified = (first / "config.json").stat().st_mtime_ns
    assert SMALL.save(tmp_path / "a") == first
    assert (first / "config.json").stat().st_mtime_ns == modified
    weights = load(first).state_dict()
    again = load(SMALL.save(tmp_path / "b")).state_dict()
    other = load(replace(SMALL, seed=1).save(tmp_path / "b")).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name], again[name])
    assert not torch.equal(weights[name], other[name])


def test_an_unfinished_one_is_made_anew(tmp_path: Path) -> None:
    directory = SMALL.save(tmp_path)
    (directory / "random_model.json").unlink()
    (directory / "config.json").write_text("{}")
    check_checkpoint(SMALL.save(tmp_path))
    assert load(directory).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 0),
        ("vocab_size", 100),
        ("hidden_size", 60),
        ("num_kv_heads", 3),
        ("dtype", "int8"),
    ],
)
def test_sizes_that_make_no_model_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        replace(SMALL, **{name: value})  # type: ignore[arg-type]


def test_a_plan_by_position_keeps_the_first_and_the_last_layer_longest() -> None:
    plan = positional_plan(5, "sha256:x")
    assert plan.removal_order == (3, 2, 1, 0, 4)
    assert sorted(plan.skipped(3)) == [2, 3]
    assert positional_plan(1, "sha256:x").removal_order == (0,)
