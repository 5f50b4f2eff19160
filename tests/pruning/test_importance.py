from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pruning.importance import (
    BlockInfluence,
    BlockInfluenceEstimator,
    ImportanceError,
    block_influence,
    measure_block_influence,
    merge_sums,
)
from tests.conftest import data_path


def states(num_tokens: int, hidden: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    change = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    return before, before + 0.7 * change


def oracle(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Score and standard error by the definition, in numpy's float64."""
    a, b = before.double().numpy(), after.double().numpy()
    cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1)) / np.sqrt((b * b).sum(-1))
    return 1 - cosines.mean(), cosines.std(ddof=1) / math.sqrt(len(cosines))


def measure(before: torch.Tensor, after: torch.Tensor, *cuts: int) -> BlockInfluence:
    estimator = BlockInfluenceEstimator(1)
    bounds = [0, *sorted(cuts), len(before)]
    for start, end in pairwise(bounds):
        estimator.update(0, before[start:end], after[start:end])
    return block_influence(estimator.sums())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_agrees_with_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    before, after = (state.to(dtype) for state in states(500))
    measured = measure(before, after)
    score, stderr = oracle(before, after)
    assert measured.scores[0] == pytest.approx(score, rel=0, abs=tolerance)
    assert measured.stderrs[0] == pytest.approx(stderr, rel=0, abs=tolerance)
    assert measured.num_tokens == 500


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n)))))
def test_chunks_do_not_matter(split: tuple[int, list[int]]) -> None:
    num_tokens, cuts = split
    before, after = states(num_tokens)
    whole, pieces = measure(before, after), measure(before, after, *cuts)
    assert pieces.scores == pytest.approx(whole.scores, rel=1e-13)
    assert pieces.stderrs == pytest.approx(whole.stderrs, rel=1e-9)
    assert pieces.num_tokens == whole.num_tokens == num_tokens


def test_float32_states_are_summed_in_float64() -> None:
    before, after = (state.float() for state in states(3000))
    together = BlockInfluenceEstimator(1)
    influences = []
    for token in range(3000):
        alone = BlockInfluenceEstimator(1)
        for estimator in (alone, together):
            estimator.update(0, before[token : token + 1], after[token : token + 1])
        influences.append(alone.sums()[0][1])
    num_tokens, total, squares = together.sums()[0]
    assert num_tokens == 3000
    assert total == pytest.approx(math.fsum(influences), rel=1e-13)
    assert squares == pytest.approx(math.fsum(x * x for x in influences), rel=1e-13)


def test_merged_sums_are_those_of_all_tokens() -> None:
    before, after = states(100)
    parts = []
    for rows in (slice(0, 30), slice(30, 100)):
        estimator = BlockInfluenceEstimator(2)
        estimator.update(0, before[rows], after[rows])
        estimator.update(1, after[rows], before[rows].neg())
        parts.append(json.loads(json.dumps(estimator.sums())))
    merged = block_influence(merge_sums(*parts))
    assert merged.scores[0] == pytest.approx(oracle(before, after)[0], rel=1e-13)
    assert merged.scores[1] == pytest.approx(oracle(after, -before)[0], rel=1e-13)
    assert merged.num_tokens == 100


def test_sums_of_other_models_do_not_merge() -> None:
    with pytest.raises(ValueError, match="got 1 and 2 layers"):
        merge_sums([[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]] * 2)


def test_the_scale_of_a_state_does_not_matter() -> None:
    before, after = (state.float() for state in states(50))
    reference = measure(before, after)
    # Powers of two change exponents alone; the products of such norms leave float32's range.
    scaled = measure(before * 2.0**-50, after * 2.0**-40)
    assert scaled == reference
    assert measure(before * 2.0**50, after * 2.0**60) == reference


def test_an_unchanged_state_scores_zero_and_a_turned_one_two() -> None:
    before, _ = states(50)
    assert measure(before, before).scores[0] == pytest.approx(0, abs=1e-15)
    assert measure(before, -before).scores[0] == pytest.approx(2, abs=1e-15)


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    # A matrix over all pairs of these tokens would take 640 GB.
    before, after = states(400_000, hidden=2)
    score, _ = oracle(before.float(), after.float())
    assert measure(before.float(), after.float()).scores[0] == pytest.approx(score, abs=1e-6)


def test_update_reads_nothing_back_from_the_device() -> None:
    # Tensors on the meta device have no values: whatever asks for one raises.
    state = torch.empty(8, 4, device="meta")
    estimator = BlockInfluenceEstimator(1)
    estimator.update(0, state, state)
    estimator.update(0, state, state)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        estimator.sums()


def test_updates_inside_and_outside_inference_mode_add_up() -> None:
    before, after = states(20)
    estimator = BlockInfluenceEstimator(1)
    with torch.inference_mode():
        estimator.update(0, before[:10], after[:10])
    estimator.update(0, before[10:].requires_grad_(), after[10:])
    assert block_influence(estimator.sums()).scores[0] == pytest.approx(
        oracle(before.detach(), after)[0]
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_refuses_a_state_without_direction(value: float, side: int) -> None:
    pair = states(10)
    estimator = BlockInfluenceEstimator(2)
    estimator.update(0, *pair)
    pair[side][4] = value
    estimator.update(1, *pair)
    with pytest.raises(ImportanceError, match="layer 1: the block influence is not finite"):
        block_influence(estimator.sums())


def test_refuses_a_layer_that_was_not_measured() -> None:
    estimator = BlockInfluenceEstimator(2)
    estimator.update(0, *states(10))
    with pytest.raises(ImportanceError, match="layer 1: measured on 0 tokens"):
        block_influence(estimator.sums())
    estimator.update(1, *states(9))
    with pytest.raises(ImportanceError, match="layer 1: measured on 9 tokens, but layer 0 on 10"):
        block_influence(estimator.sums())
    with pytest.raises(ImportanceError, match="no layers"):
        block_influence([])


def test_refuses_shapes_and_layers_that_do_not_fit() -> None:
    before, after = states(10)
    estimator = BlockInfluenceEstimator(1)
    with pytest.raises(ValueError, match="layer: got 1, allowed: 0 to 0"):
        estimator.update(1, before, after)
    with pytest.raises(ValueError, match=r"got shapes \[10, 16\] and \[9, 16\]"):
        estimator.update(0, before, after[:9])
    with pytest.raises(ValueError, match=r"allowed: equal shapes \[num_tokens, hidden\]"):
        estimator.update(0, before[None], after[None])
    with pytest.raises(ValueError, match="num_layers: got 0"):
        BlockInfluenceEstimator(0)


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    untyped: Any = LlamaForCausalLM
    model = untyped(config).double().eval()
    # Weights of another scale than the initial ones, so that the final norm turns the state.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_last_layer_is_measured_before_the_final_norm(llama: Any) -> None:
    input_ids = torch.arange(40).reshape(2, 20)
    without_norm = copy.deepcopy(llama)
    without_norm.model.norm = nn.Identity()
    with torch.inference_mode():
        raw = without_norm(input_ids, output_hidden_states=True).hidden_states
        normed = llama(input_ids, output_hidden_states=True).hidden_states
    expected = [oracle(raw[i].flatten(0, 1), raw[i + 1].flatten(0, 1)) for i in range(3)]
    falsified, _ = oracle(normed[2].flatten(0, 1), normed[3].flatten(0, 1))

    measured = measure_block_influence(llama, [input_ids])
    assert measured.scores == pytest.approx([score for score, _ in expected], rel=1e-12)
    assert measured.stderrs == pytest.approx([stderr for _, stderr in expected], rel=1e-9)
    assert abs(falsified - expected[2][0]) > 0.01


def test_padding_is_not_counted(llama: Any) -> None:
    lengths = [5, 12, 9]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (1, length), generator=generator) for length in lengths]
    padded = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros(3, 12, dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, : lengths[row]] = ids
        mask[row, : lengths[row]] = 1
    alone = measure_block_influence(llama, rows)
    together = measure_block_influence(llama, [padded], [mask])
    assert together.num_tokens == alone.num_tokens == sum(lengths)
    assert together.scores == pytest.approx(alone.scores, rel=1e-12)
    assert together.stderrs == pytest.approx(alone.stderrs, rel=1e-9)
    assert measure_block_influence(llama, [padded]).num_tokens == 36


def test_layers_may_be_named(llama: Any) -> None:
    input_ids = torch.arange(30)[None]
    every = measure_block_influence(llama, [input_ids])
    last = measure_block_influence(llama, [input_ids], layers=[llama.model.layers[2]])
    assert last.scores == every.scores[2:]


def test_hooks_are_removed_even_after_an_error(llama: Any) -> None:
    input_ids = torch.arange(30)[None]
    with pytest.raises(ValueError, match="attention_masks: got shape"):
        measure_block_influence(llama, [input_ids], [torch.ones(1, 29)])
    measure_block_influence(llama, [input_ids])
    assert not any(layer._forward_hooks for layer in llama.model.layers)


def test_refuses_models_it_cannot_measure(llama: Any) -> None:
    with pytest.raises(ValueError, match="training mode"):
        measure_block_influence(llama.train(), [torch.arange(30)[None]])
    with pytest.raises(ValueError, match="Linear has no module list named 'layers'"):
        measure_block_influence(nn.Linear(2, 2).eval(), [torch.arange(30)[None]])


def test_a_damaged_weight_is_refused_with_its_layer(llama: Any) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(ImportanceError, match="layer 1: the block influence is not finite"):
        measure_block_influence(llama, [torch.arange(30)[None]])


def test_stories260k(stories_model: Path) -> None:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text())[:100]
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32)
    input_ids = torch.tensor(
        [tokenizer(t, truncation=True, max_length=128).input_ids for t in texts]
    )
    measured = measure_block_influence(model, input_ids.chunk(4))
    assert measured.num_tokens == 100 * 128
    assert measured.scores == pytest.approx([0.230, 0.144, 0.116, 0.122, 0.153], abs=0.01)
    assert all(0 < stderr < 0.002 for stderr in measured.stderrs)
