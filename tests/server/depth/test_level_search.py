"""Levels by quality: which depths are measured, and which they get."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from server.depth.level_search import (
    REACH,
    chooses_within,
    is_within,
    problem_of,
    search_levels,
    shallowest_depth,
    with_found_levels,
    writes_within,
)
from server.depth.levels import DEFAULT_LEVELS, DepthPair, Level, LevelSpec, Limit
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from tests.server.rpc.conftest import make_plan

NUM_LAYERS = 8

curves = st.lists(st.booleans(), min_size=0, max_size=120)


def quality(perplexity: float, log_ratio_stderr: float | None = None) -> Quality:
    return Quality(perplexity, 0.5, 0.9, 0.1, 100, log_ratio_stderr)


def policy(*specs: LevelSpec, default_level: str = "") -> DepthPolicy:
    levels = tuple(spec.resolve(NUM_LAYERS) for spec in specs)
    return DepthPolicy(make_plan(), levels, default_level, specs=specs)


def measured(
    policy: DepthPolicy,
    losses: Mapping[int, float],
    prompt_losses: Mapping[int, float] | None = None,
) -> tuple[DepthPolicy, set[DepthPair]]:
    """Measure what the search asks for until it ends; return the depths that it asked for."""
    asked: set[DepthPair] = set()
    while missing := [*search_levels(policy).missing, *search_levels(policy).missing_that_can_wait]:
        pairs = {policy.dense, *missing}
        assert not pairs <= asked, "the search goes on"
        asked |= pairs
        qualities = {}
        for pair in pairs:
            is_prompt = pair.prefill_layers != pair.decode_layers
            curve = prompt_losses if is_prompt and prompt_losses is not None else losses
            loss = 0.0 if pair == policy.dense else curve[pair.prefill_layers]
            qualities[pair] = quality(10 * (1 + loss))
        policy = with_found_levels(policy.with_measured(Measured(qualities)))
    return policy, asked


@given(curves)
def test_bisection_keeps_its_promise_on_any_curve(good: list[bool]) -> None:
    num_layers = len(good) + 1
    asked: list[int] = []

    def is_good(depth: int) -> bool:
        assert 1 <= depth < num_layers
        asked.append(depth)
        return good[depth - 1]

    depth = shallowest_depth(num_layers, is_good)
    assert depth == num_layers or good[depth - 1]
    assert not any(good[max(depth - 1 - REACH, 0) : depth - 1])
    num_steps_down = sum(good)
    assert len(asked) <= math.ceil(math.log2(num_layers)) + REACH * (num_steps_down + 1)


@given(st.integers(1, 300), st.data())
def test_bisection_finds_the_shallowest_depth_of_a_monotone_curve(
    num_layers: int, data: st.DataObject
) -> None:
    shallowest = data.draw(st.integers(1, num_layers))
    asked: set[int] = set()

    def is_good(depth: int) -> bool:
        asked.add(depth)
        return depth >= shallowest

    assert shallowest_depth(num_layers, is_good) == shallowest
    assert len(asked) <= math.ceil(math.log2(num_layers)) + REACH


@given(curves, st.integers(0, REACH - 1))
def test_a_dip_within_reach_is_crossed(tail: list[bool], width: int) -> None:
    """Depths that are good enough are found behind fewer than ``REACH`` that are not."""
    good = [*tail, True, *[False] * width, True]
    found = shallowest_depth(len(good) + 1, lambda depth: good[depth - 1])
    brute_force = len(good) - 1 - width
    assert found <= brute_force


def test_one_standard_error_more_must_be_within_the_loss() -> None:
    dense = quality(10)
    assert is_within(quality(12.5), dense, 0.25)
    assert is_within(quality(12.4, 0.008), dense, 0.25)
    assert not is_within(quality(12.4, 0.009), dense, 0.25)
    assert is_within(quality(9), dense, 0.0), "pruning may help"
    assert not is_within(quality(math.inf), dense, 1.0)
    assert not is_within(quality(math.inf), quality(math.inf), 1.0)


LOSSES = {7: 0.03, 6: 0.08, 5: 0.12, 4: 0.3, 3: 0.8, 2: 4.0, 1: 20.0}
PROMPT_LOSSES = {7: 0.01, 6: 0.019, 5: 0.06, 4: 0.09, 3: 0.15, 2: 0.5, 1: 3.0}


def test_default_levels() -> None:
    found, asked = measured(policy(*DEFAULT_LEVELS), LOSSES, PROMPT_LOSSES)
    assert found.levels == (
        Level("dense", 8, 8),
        Level("balanced", 6, 6, 0.1),
        Level("fast", 5, 5, 0.25),
        Level("turbo", 3, 3, 1.0),
        Level("prompt", 6, 8, 0.05),
    )
    assert found.default_level == "dense"
    assert search_levels(found).pending == []
    assert search_levels(found).unmet == []
    assert DepthPair(7, 7) not in asked, "not every depth is measured"


def test_default_levels_that_are_the_same_or_dense_do_not_exist() -> None:
    cliff = {depth: 0.05 if depth >= 6 else 50.0 for depth in range(1, 8)}
    found, _ = measured(policy(*DEFAULT_LEVELS), cliff, dict.fromkeys(range(1, 8), 9.0))
    assert found.levels == (Level("dense", 8, 8), Level("balanced", 6, 6, 0.1))
    found, _ = measured(policy(*DEFAULT_LEVELS), dict.fromkeys(range(1, 8), 9.0))
    assert found.levels == (Level("dense", 8, 8),)
    assert search_levels(found).unmet == []


def test_a_level_that_was_asked_for_is_dense_where_no_depth_is_good_enough() -> None:
    specs = LevelSpec("full", 8), LevelSpec("fast", max_quality_loss=0.01)
    found, _ = measured(policy(*specs, default_level="fast"), LOSSES)
    assert found.levels == (Level("full", 8, 8), Level("fast", 8, 8, 0.01))
    assert found.default_level == "fast"
    (unmet,) = search_levels(found).unmet
    assert problem_of(unmet) == (
        "level fast: no depth was found that loses at most 0.01 in perplexity, so it runs all 8 "
        "layers"
    )


def test_levels_that_were_asked_for_may_be_the_same() -> None:
    specs = LevelSpec("a", max_quality_loss=0.1), LevelSpec("b", max_quality_loss=0.11)
    found, _ = measured(policy(*specs), LOSSES)
    assert [level.depths for level in found.levels] == [DepthPair(6, 6)] * 2


def test_a_level_that_is_pending_runs_all_layers_or_does_not_exist() -> None:
    asked_for = policy(LevelSpec("fast", max_quality_loss=0.2))
    assert asked_for.levels == (Level("fast", 8, 8, 0.2),)
    search = search_levels(asked_for)
    assert (search.pending, search.missing) == (["fast"], [DepthPair(4, 4)])
    by_default = with_found_levels(policy(*DEFAULT_LEVELS))
    assert by_default.levels == (Level("dense", 8, 8),)
    search = search_levels(by_default)
    assert search.pending == ["balanced", "fast", "turbo", "prompt"]
    assert set(search.missing) == {DepthPair(4, 4)}
    assert search.missing_that_can_wait == [DepthPair(4, 8)]


def test_a_level_does_not_take_the_place_of_one_that_is_pending() -> None:
    """Else it would go again when the other is found at the same depth."""
    specs = DEFAULT_LEVELS[:3]
    begun = policy(*specs).with_measured(
        Measured(
            {
                DepthPair(d, d): quality(10 * (1 + loss))
                for d, loss in ((8, 0), (4, 0.2), (3, 9), (2, 9))
            }
        )
    )
    assert with_found_levels(begun).levels == (Level("dense", 8, 8),)


@given(
    st.lists(st.floats(0, 3), min_size=7, max_size=7),
    st.lists(st.floats(0, 3), min_size=7, max_size=7),
)
def test_everything_measured_gives_the_levels_of_the_search(
    losses: list[float], prompt_losses: list[float]
) -> None:
    curves = [dict(enumerate(each, start=1)) for each in (losses, prompt_losses)]
    searched, _ = measured(policy(*DEFAULT_LEVELS), *curves)
    qualities = {searched.dense: quality(10)}
    for depth in range(1, 8):
        qualities[DepthPair(depth, depth)] = quality(10 * (1 + curves[0][depth]))
        qualities[DepthPair(depth, 8)] = quality(10 * (1 + curves[1][depth]))
    at_once = with_found_levels(policy(*DEFAULT_LEVELS).with_measured(Measured(qualities)))
    assert at_once.levels == searched.levels
    for level in searched.levels[1:]:
        assert level.max_quality_loss is not None
        curve = curves[level.decode_layers == 8]
        assert curve[level.prefill_layers] <= level.max_quality_loss + 1e-9


def test_load_goes_on_to_count_when_levels_are_found() -> None:
    found, _ = measured(policy(*DEFAULT_LEVELS), LOSSES, PROMPT_LOSSES)
    loaded = found.with_auto_level("balanced").with_present_level("fast")
    dearer = {depth: 3 * loss for depth, loss in LOSSES.items()}
    qualities = {DepthPair(d, d): quality(10 * (1 + loss)) for d, loss in dearer.items()}
    changed = with_found_levels(loaded.with_measured(Measured(qualities)))
    assert changed.level("fast").depths == DepthPair(6, 6)
    assert (changed.auto_level, changed.present_level) == ("balanced", "fast")


@pytest.mark.parametrize("missing", ["balanced", "fast"])
def test_automatic_depth_survives_a_level_that_ceases_to_exist(missing: str) -> None:
    found, _ = measured(policy(*DEFAULT_LEVELS), LOSSES, PROMPT_LOSSES)
    loaded = found.with_auto_level("balanced").with_present_level(missing)
    qualities = {DepthPair(d, d): quality(1000) for d in range(1, 8)}
    changed = with_found_levels(loaded.with_measured(Measured(qualities)))
    assert [level.name for level in changed.levels] == ["dense", "prompt"]
    assert (changed.auto_level, changed.present_level) == ("dense", "dense")


def probes(
    ratio: float, repeated: float = 0.1, accuracy: float = 0.8, agreement: float = 1.0
) -> Probes:
    return Probes(
        Writing(3 * ratio, 3.0, ratio, 0.02 * ratio, repeated, 0.1, 0.2, 16, 768, 0.03),
        Choosing(accuracy, 0.05, agreement, 0.05, 64, 0.25),
    )


DENSE_PROBES = probes(1.0)


def probed(policy: DepthPolicy, by_depth: Mapping[int, Probes]) -> tuple[DepthPolicy, list[int]]:
    """Measure what the search asks for, its probes too; return the depths that were probed."""
    asked: list[int] = []
    while True:
        search = search_levels(policy)
        if not search.missing and not search.missing_probes:
            return policy, asked
        asked += [pair.decode_layers for pair in search.missing_probes]
        found = {
            pair: DENSE_PROBES if pair == policy.dense else by_depth[pair.prefill_layers]
            for pair in search.missing_probes
        }
        qualities = {
            pair: quality(10 * (1 + (LOSSES | {8: 0.0})[pair.prefill_layers]))
            for pair in {policy.dense, *search.missing}
        }
        policy = with_found_levels(policy.with_measured(Measured(qualities, probes=found)))


def test_a_level_by_what_it_loses_in_writing() -> None:
    by_depth = {depth: probes(1 + 0.1 * (8 - depth)) for depth in range(1, 8)}
    found, asked = probed(
        policy(LevelSpec("full", 8), LevelSpec("w", max_writing_loss=0.3)), by_depth
    )
    # At 5 layers the loss is 0.3 and its noise comes on top.
    assert found.level("w") == Level("w", 6, 6, max_writing_loss=0.3)
    assert len(asked) < 7
    assert found.level("w").limits == {Limit.WRITING: 0.3}
    assert str(found.level("w")) == "w=6 (writing loss 0.3)"


def test_loops_are_no_good_writing_whatever_their_perplexity() -> None:
    looping = probes(0.5, repeated=0.7)
    assert not writes_within(looping, 0.5)
    assert writes_within(looping, 1.0), "e to the power of 0.6 and its noise is 1.9"
    by_depth = {depth: probes(1.05) if depth > 5 else looping for depth in range(1, 8)}
    found, _ = probed(policy(LevelSpec("full", 8), LevelSpec("w", max_writing_loss=0.5)), by_depth)
    assert found.level("w").depths == DepthPair(6, 6)


def test_one_standard_error_more_must_be_within_the_loss_in_writing() -> None:
    noise = math.hypot(0.02, 0.03)
    assert writes_within(probes(1.25 / math.exp(noise) * 0.999), 0.25)
    assert not writes_within(probes(1.25 / math.exp(noise) * 1.001), 0.25)
    assert not writes_within(probes(math.inf), 1e9)
    assert not writes_within(Probes(None, None), 1e9), "what was not measured"
    unmeasured = Writing(None, None, None, None, 0.1, None, None, 16, 768)
    assert not writes_within(Probes(unmeasured, None), 1e9)


def test_a_level_by_what_it_loses_in_choosing() -> None:
    by_depth = {
        depth: probes(9.0, accuracy=0.8 - 0.02 * (8 - depth), agreement=1 - 0.02 * (8 - depth))
        for depth in range(1, 8)
    }
    found, asked = probed(
        policy(LevelSpec("full", 8), LevelSpec("c", max_choosing_loss=0.1)), by_depth
    )
    best = min(
        depth
        for depth, each in by_depth.items()
        if 0.02 * (8 - depth) + math.sqrt((0.02 * (8 - depth) - (0.02 * (8 - depth)) ** 2) / 64)
        <= 0.1
    )
    assert found.level("c") == Level("c", best, best, max_choosing_loss=0.1)
    assert 8 in asked, "the dense model chooses, too"
    assert not chooses_within(Probes(None, None), DENSE_PROBES, 1.0)


def test_several_limits_hold_together() -> None:
    by_depth = {depth: probes(1.0 if depth > 6 else 5.0) for depth in range(1, 8)}
    spec = LevelSpec("both", max_quality_loss=0.25, max_writing_loss=0.25)
    found, asked = probed(policy(LevelSpec("full", 8), spec), by_depth)
    assert found.level("both") == Level("both", 7, 7, 0.25, 0.25)
    assert not {3, 2, 1} & set(asked), "perplexity is too high there"


def test_what_is_said_of_a_limit_that_no_depth_keeps() -> None:
    by_depth = {depth: probes(5.0, accuracy=0.1, agreement=0.2) for depth in range(1, 8)}
    spec = LevelSpec("w", max_writing_loss=0.25, max_choosing_loss=0.125)
    found, _ = probed(policy(LevelSpec("full", 8), spec), by_depth)
    [unmet] = search_levels(found).unmet
    assert problem_of(unmet) == (
        "level w: no depth was found that loses at most 0.25 in writing and 0.125 in choosing, "
        "so it runs all 8 layers"
    )
