from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lengths import Lengths
from bench.workload import Workload, num_tokens, poisson_arrivals

WORKLOAD = Workload(Lengths.parse("uniform:2:9"), Lengths.parse("list:3,5"), 400, seed=1)


def test_every_depth_gets_the_same_work() -> None:
    shallow, dense = WORKLOAD.streams(3, 2, depth=1), WORKLOAD.streams(3, 2, depth=16)
    assert [[r.prompt_ids for r in s] for s in shallow] == [
        [r.prompt_ids for r in s] for s in dense
    ]
    assert {r.depth for stream in shallow for r in stream} == {1}
    assert num_tokens(shallow) == num_tokens(dense) == 3 * (3 + 5)


def test_prompts_share_no_beginning() -> None:
    prompts = [request.prompt_ids for request in WORKLOAD.requests(40)]
    assert len({prompt[:2] for prompt in prompts}) == len(prompts)


@given(st.integers(2, 50_000), st.integers(0, 1000))
def test_prompts_stay_within_the_vocabulary(vocab_size: int, seed: int) -> None:
    workload = Workload(Lengths.parse("8"), Lengths.parse("1"), vocab_size, seed)
    ids = {i for request in workload.requests(5) for i in request.prompt_ids}
    assert min(ids) >= 1
    assert max(ids) < vocab_size


def test_arrivals_are_those_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals(4.0, 20_000, seed=0)
    assert arrivals == poisson_arrivals(4.0, 20_000, seed=0)
    assert arrivals != poisson_arrivals(4.0, 20_000, seed=1)
    assert arrivals == sorted(arrivals)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    # Mean and deviation of an exponential distribution are 1 / rate.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(rate, 3, seed=0)
