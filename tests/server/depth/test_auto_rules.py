"""Levels of automatic depth, by the kind of request."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from server.depth.auto_rules import AutoRules, common_ladder, ladder, nearest
from server.depth.depth_choice import RequestKind
from server.depth.levels import DepthPair, Level
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from tests.server.depth.test_policy import plan

GENERATE, SCORE = RequestKind.GENERATE, RequestKind.SCORE
DEPTHS = (8, 6, 4, 2)
LEVELS = tuple(Level(f"d{depth}", depth, depth) for depth in DEPTHS)


def probes(
    ratio: float | None = 1.0, repeated: float = 0.1, accuracy: float | None = 0.9
) -> Probes:
    """Return probes beside a dense model with a repeated share of 0.1 and an accuracy of 0.9."""
    has_dense = ratio is not None
    return Probes(
        writing=Writing(
            perplexity=ratio,
            dense_perplexity=1.0 if has_dense else None,
            ratio=ratio,
            ratio_stderr=0.0 if has_dense else None,
            repeated_share=repeated,
            dense_repeated_share=0.1 if has_dense else None,
            first_token_changed=0.0 if has_dense else None,
            num_prompts=16,
            num_tokens=768,
        ),
        choosing=None if accuracy is None else Choosing(accuracy, 0.03, 0.9, 0.03, 64, 0.25),
    )


def policy(measured: Mapping[int, Probes], perplexities: Mapping[int, float] = {}) -> DepthPolicy:
    """Return a policy whose levels all have the perplexity of the dense model, unless told."""
    return DepthPolicy(
        plan(),
        LEVELS,
        measured=Measured(
            {
                DepthPair(d, d): Quality(perplexities.get(d, 10.0), 0.1, 0.9, 0.1, 100)
                for d in DEPTHS
            },
            probes={DepthPair(d, d): each for d, each in measured.items()},
        ),
    )


def depths(policy: DepthPolicy, rules: AutoRules, kind: RequestKind) -> list[int]:
    return [level.decode_layers for level in ladder(policy, rules, kind)]


def test_each_kind_keeps_to_its_own_probe() -> None:
    """Depth 4 writes badly and chooses well, depth 6 the other way round."""
    of = policy({8: probes(), 6: probes(accuracy=0.6), 4: probes(ratio=3.0), 2: probes()})
    rules = AutoRules(max_writing_loss=0.5, max_repetition=0.2, max_choosing_loss=0.1)
    assert depths(of, rules, GENERATE) == [8, 6, 2]
    assert depths(of, rules, SCORE) == [8, 4, 2]
    assert [each.decode_layers for each in common_ladder(of, rules, [GENERATE, SCORE])] == [*DEPTHS]


@pytest.mark.parametrize(
    ("written", "is_used"),
    [
        (probes(ratio=1.5), True),
        (probes(ratio=1.51), False),
        (probes(ratio=math.inf), False),
        (probes(ratio=math.nan), False),
        (probes(ratio=1.0, repeated=0.3), True),
        (probes(ratio=0.5, repeated=0.4), False),  # loops have a low perplexity
        (probes(ratio=None, repeated=0.0), False),  # without a dense model
        (Probes(None, None), False),
    ],
)
def test_what_a_level_writes_decides_about_generate(written: Probes, is_used: bool) -> None:
    rules = AutoRules(max_writing_loss=0.5, max_repetition=0.2)
    assert (4 in depths(policy({4: written}), rules, GENERATE)) is is_used
    assert 4 in depths(policy({4: written}), rules, SCORE)


@pytest.mark.parametrize(
    ("chosen", "is_used"),
    [
        (probes(accuracy=0.875), True),
        (probes(accuracy=0.7), False),
        (probes(accuracy=1.0), True),
        (Probes(None, None), False),
    ],
)
def test_how_a_level_chooses_decides_about_score(chosen: Probes, is_used: bool) -> None:
    rules = AutoRules(max_choosing_loss=0.1)
    of = policy({8: probes(), 4: chosen}, {4: 500.0})
    assert (4 in depths(of, rules, SCORE)) is is_used, "whatever the perplexity"
    assert 4 not in depths(of, rules, GENERATE)
    assert 4 not in depths(policy({4: chosen}), rules, SCORE), "dense has not been measured"


def test_limits_that_are_off_need_no_probes() -> None:
    of = policy({}, {4: 500.0})
    for kind in RequestKind:
        assert depths(of, AutoRules(), kind) == [8, 6, 2], "perplexity holds for both"
    assert depths(of, AutoRules(max_writing_loss=10.0), GENERATE) == [8]
    assert depths(of, AutoRules(max_repetition=0.99), GENERATE) == [8]
    assert depths(of, AutoRules(max_choosing_loss=0.99), SCORE) == [8]


def test_agreement_is_a_limit_for_both() -> None:
    of = policy({d: probes() for d in DEPTHS})
    rules = AutoRules(min_agreement=0.95, max_writing_loss=1.0, max_choosing_loss=0.5)
    for kind in RequestKind:
        assert depths(of, rules, kind) == [8]


@given(st.sets(st.sampled_from(DEPTHS)), st.sampled_from(DEPTHS))
def test_the_nearest_level_is_never_shallower(good: set[int], depth: int) -> None:
    of = policy({})
    levels = [level for level in LEVELS if level.decode_layers in good | {8}]
    present = of.level(f"d{depth}")
    found = nearest(of, AutoRules(), present, levels)
    allowed = [level for level in levels if level.decode_layers >= depth]
    assert found == min(allowed, key=lambda level: level.decode_layers)
