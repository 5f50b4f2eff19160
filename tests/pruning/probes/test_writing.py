"""How a pruned model writes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import Continuations, Writing, repeated_share, writing

LOSSES = st.floats(0, 200)
ONE = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=12), LOSSES)
PAIRS = st.lists(st.tuples(ONE, ONE), min_size=2, max_size=8)


def continuations(each: list[tuple[list[int], float]]) -> Continuations:
    return Continuations(tuple(tuple(ids) for ids, _ in each), tuple(loss for _, loss in each))


@given(PAIRS)
def test_against_a_direct_computation(
    pairs: list[tuple[tuple[list[int], float], tuple[list[int], float]]],
) -> None:
    level, dense = [a for a, _ in pairs], [b for _, b in pairs]
    result = writing(continuations(level), continuations(dense))
    num_level, num_dense = (sum(len(ids) for ids, _ in each) for each in (level, dense))
    a, b = sum(x for _, x in level) / num_level, sum(y for _, y in dense) / num_dense
    assert result.perplexity == pytest.approx(math.exp(a))
    assert result.dense_perplexity == pytest.approx(math.exp(b))
    assert result.ratio == pytest.approx(math.exp(a - b))
    shares = [repeated_share(ids) for ids, _ in level]
    assert result.repeated_share == pytest.approx(sum(shares) / len(shares))
    assert result.dense_repeated_share == pytest.approx(
        sum(repeated_share(ids) for ids, _ in dense) / len(dense)
    )
    changed = [mine[0] != other[0] for (mine, _), (other, _) in pairs]
    assert result.first_token_changed == sum(changed) / len(changed)
    assert (result.num_prompts, result.num_tokens) == (len(pairs), num_level)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=8), st.integers(1, 9))
def test_the_error_is_that_of_the_mean_difference_where_lengths_are_equal(
    losses: list[tuple[float, float]], length: int
) -> None:
    level = continuations([([0] * length, x) for x, _ in losses])
    dense = continuations([([0] * length, y) for _, y in losses])
    result = writing(level, dense)
    differences = [(x - y) / length for x, y in losses]
    mean = sum(differences) / len(losses)
    variance = sum((each - mean) ** 2 for each in differences) / (len(losses) - 1)
    expected = math.exp(mean) * math.sqrt(variance / len(losses))
    assert result.ratio_stderr == pytest.approx(expected, abs=1e-9 * math.exp(mean))


@given(PAIRS)
def test_the_dense_model_compared_with_itself(
    pairs: list[tuple[tuple[list[int], float], tuple[list[int], float]]],
) -> None:
    dense = continuations([b for _, b in pairs])
    result = writing(dense, dense)
    assert (result.ratio, result.ratio_stderr, result.first_token_changed) == (1.0, 0.0, 0.0)
    assert result.repeated_share == result.dense_repeated_share


def test_without_a_dense_model_only_repetition_is_known() -> None:
    result = writing(Continuations(((1, 1, 1, 1, 1), (1, 2)), None), None)
    assert result.repeated_share == 0.25
    assert (result.num_prompts, result.num_tokens) == (2, 7)
    assert {
        result.perplexity,
        result.dense_perplexity,
        result.ratio,
        result.ratio_stderr,
        result.dense_repeated_share,
        result.first_token_changed,
    } == {None}


def test_a_perplexity_beyond_all_numbers() -> None:
    level = Continuations(((1,), (2,)), (1000.0, 1000.0))
    assert writing(level, Continuations(((1,), (2,)), (1.0, 1.0))).ratio == math.inf


@pytest.mark.parametrize(
    ("level", "dense", "problem"),
    [
        (Continuations(((1,),), None), None, "level: got 1 continuations, allowed: 2 or more"),
        (Continuations(((1,), ()), None), None, "level: got a continuation without tokens"),
        (Continuations(((1,), (2,)), (1.0,)), None, "level: got 2 continuations and 1 losses"),
        (
            Continuations(((1,), (2,)), (1.0, 1.0)),
            Continuations(((1,),), (1.0,)),
            "dense: got 1 continuations and 1 losses, allowed: 2",
        ),
    ],
)
def test_continuations_that_cannot_be(
    level: Continuations, dense: Continuations | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        writing(level, dense)


def test_what_is_lost_counts_repetition_and_gives_no_credit_for_it() -> None:
    def lost(ratio: float, repeated: float) -> tuple[float, float] | None:
        return Writing(None, None, ratio, 0.1, repeated, 0.2, None, 16, 768, 0.04).loss

    assert lost(1.0, 0.2) == pytest.approx((0.0, math.hypot(0.1, 0.04)))
    assert lost(math.e, 0.5) == pytest.approx((1.3, math.hypot(0.1 / math.e, 0.04)))
    assert lost(0.5, 0.5) == pytest.approx((0.3, math.hypot(0.2, 0.04)))
    assert lost(math.e, 0.1) == pytest.approx((1.0, math.hypot(0.1 / math.e, 0.04)))
    assert lost(0.0, 0.2) == (0.0, 0.04)
    assert lost(math.inf, 0.2) == (math.inf, 0.04)
    assert writing(Continuations(((1,), (2,)), None), None).loss is None


def test_the_noise_of_repetition_is_that_of_the_pairs() -> None:
    looping = Continuations(((1,) * 5, (1, 2, 3, 4, 5)), (1.0, 1.0))
    dense = Continuations(((1, 2, 3, 4, 5), (5, 4, 3, 2, 1)), (1.0, 1.0))
    found = writing(looping, dense)
    assert found.repeated_share == 0.25
    # The differences are 1/2 and 0: their deviation is 1/2 / sqrt(2), over sqrt(2) prompts.
    assert found.repeated_stderr == pytest.approx(0.25)
    assert writing(looping, looping).repeated_stderr == 0.0
