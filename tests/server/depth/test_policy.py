"""The depth that a request gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.plan import Plan
from pruning.quality import Quality
from server.depth.depth_choice import Auto, DepthChoice, Layers, NamedLevel, PruneRatio, RequestKind
from server.depth.levels import DepthPair, Level
from server.depth.measured import Measured, Speed
from server.depth.policy import DepthPolicy
from server.depth.served_depth import Reason, ServedDepth
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition, FathomError, InvalidArgument, UnknownLevel

ORDER = (5, 4, 3, 6, 2, 1, 7, 0)
LEVELS = (Level("dense", 8, 8), Level("fast", 4, 4), Level("generative", 5, 8))


def plan(order: tuple[int, ...] = ORDER) -> Plan:
    return Plan(
        removal_order=order,
        scores=(0.5,) * len(order),
        stderrs=(0.1,) * len(order),
        model_fingerprint="sha256:m",
        text_fingerprint="sha256:t",
        num_tokens=10,
        versions={},
        created_at=0.0,
    )


def quality(perplexity: float) -> Quality:
    return Quality(perplexity, 0.1, 0.9, 0.01, 100)


def qualities(perplexities: Mapping[int, float]) -> dict[DepthPair, Quality]:
    return {DepthPair(d, d): quality(p) for d, p in perplexities.items()}


POLICY = DepthPolicy(plan(), LEVELS)


@pytest.mark.parametrize(
    ("depth", "prefill", "expected"),
    [
        (None, None, ServedDepth(8, 8, Reason.DEFAULT)),
        (None, Layers(3), ServedDepth(3, 8, Reason.DEFAULT)),
        (Layers(6), None, ServedDepth(6, 6, Reason.REQUESTED)),
        (Layers(6), Layers(2), ServedDepth(2, 6, Reason.REQUESTED)),
        (Layers(6), PruneRatio(0.5), ServedDepth(4, 6, Reason.REQUESTED)),
        (Layers(6), NamedLevel("generative"), ServedDepth(5, 6, Reason.REQUESTED)),
        (PruneRatio(0.0), None, ServedDepth(8, 8, Reason.REQUESTED)),
        (PruneRatio(0.99), None, ServedDepth(1, 1, Reason.REQUESTED)),
        (NamedLevel("generative"), None, ServedDepth(5, 8, Reason.REQUESTED)),
        (NamedLevel("generative"), Layers(8), ServedDepth(8, 8, Reason.REQUESTED)),
        (Auto(), None, ServedDepth(8, 8, Reason.AUTO)),
        (Layers(6), Auto(), ServedDepth(8, 6, Reason.REQUESTED)),
    ],
)
def test_depth(depth: DepthChoice, prefill: DepthChoice, expected: ServedDepth) -> None:
    layers, served = POLICY.resolve(depth, prefill)
    assert served == expected
    assert layers == LayerSelection(
        prefill_skips=tuple(sorted(ORDER[: 8 - expected.prefill_layers])),
        decode_skips=tuple(sorted(ORDER[: 8 - expected.decode_layers])),
    )


@given(st.permutations(range(8)), st.integers(1, 8), st.integers(1, 8))
def test_a_request_runs_as_many_layers_as_it_is_told(
    order: list[int], prefill: int, decode: int
) -> None:
    layers, served = DepthPolicy(plan(tuple(order)), LEVELS).resolve(
        Layers(decode), Layers(prefill)
    )
    assert (served.prefill_layers, served.decode_layers) == (prefill, decode)
    assert set(layers.prefill_skips) == set(order[: 8 - prefill])
    assert set(layers.decode_skips) == set(order[: 8 - decode])
    assert list(layers.prefill_skips) == sorted(layers.prefill_skips)
    assert list(layers.decode_skips) == sorted(layers.decode_skips)


@pytest.mark.parametrize(
    ("depth", "prefill", "error", "message"),
    [
        (Layers(0), None, InvalidArgument, "depth.layers: got 0, allowed: 1 to 8"),
        (Layers(9), None, InvalidArgument, "depth.layers: got 9, allowed: 1 to 8"),
        (None, Layers(9), InvalidArgument, "prefill_depth.layers: got 9, allowed: 1 to 8"),
        (
            PruneRatio(1.0),
            None,
            InvalidArgument,
            "depth.prune_ratio: got 1.0, allowed: 0 or more and less than 1",
        ),
        (
            PruneRatio(math.nan),
            None,
            InvalidArgument,
            "depth.prune_ratio: got nan, allowed: 0 or more and less than 1",
        ),
        (
            PruneRatio(-0.5),
            None,
            InvalidArgument,
            "depth.prune_ratio: got -0.5, allowed: 0 or more and less than 1",
        ),
        (
            NamedLevel("slow"),
            None,
            UnknownLevel,
            "no level 'slow'; the levels are dense, fast, generative",
        ),
        (
            Auto(-0.1),
            None,
            InvalidArgument,
            "depth.auto.max_quality_loss: got -0.1, allowed: 0 or more",
        ),
    ],
)
def test_depths_that_do_not_exist(
    depth: DepthChoice, prefill: DepthChoice, error: type[FathomError], message: str
) -> None:
    with pytest.raises(error) as caught:
        POLICY.resolve(depth, prefill)
    assert str(caught.value) == message


def test_auto_gets_the_level_that_the_operator_chose() -> None:
    policy = POLICY.with_auto_level("fast")
    assert policy.resolve(Auto())[1] == ServedDepth(4, 4, Reason.AUTO)
    assert policy.resolve(None)[1] == ServedDepth(8, 8, Reason.DEFAULT)
    with pytest.raises(UnknownLevel):
        POLICY.with_auto_level("slow")


@pytest.mark.parametrize(
    ("max_loss", "expected"), [(0.0, 8), (0.09, 8), (0.1, 6), (0.29, 6), (0.3, 4), (50.0, 4)]
)
def test_auto_within_a_quality_loss_is_as_near_to_the_level_as_it_may(
    max_loss: float, expected: int
) -> None:
    # 16, 17.5 and 20.75 over 16 are exact in binary, less 1: 0.09375 and 0.296875.
    policy = POLICY.with_measured(Measured(qualities({8: 16.0, 6: 17.5, 4: 20.75, 2: 100.0})))
    under_load = policy.with_present_level("fast")
    reason = Reason.AUTO if expected == 8 else Reason.DEGRADED
    assert under_load.resolve(Auto(max_loss))[1] == ServedDepth(expected, expected, reason)
    chosen = policy.with_auto_level("fast")
    assert chosen.resolve(Auto(max_loss))[1] == ServedDepth(expected, expected, Reason.AUTO)
    # Without load nothing is given up, however much may be.
    assert policy.resolve(Auto(max_loss))[1] == ServedDepth(8, 8, Reason.AUTO)


def test_auto_within_a_quality_loss_takes_mixed_depths_of_levels_alone() -> None:
    mixed = {DepthPair(5, 8): quality(17.0), DepthPair(1, 8): quality(16.0)}
    policy = POLICY.with_measured(Measured({**mixed, **qualities({8: 16.0})}))
    under_load = policy.with_present_level("generative")
    assert under_load.resolve(Auto(1.0))[1] == ServedDepth(5, 8, Reason.DEGRADED)
    assert under_load.resolve(Auto(0.01))[1] == ServedDepth(8, 8, Reason.AUTO)


@given(
    st.dictionaries(st.integers(1, 7), st.floats(1, 1000), max_size=7),
    st.floats(1, 1000),
    st.floats(0, 10),
)
def test_auto_never_loses_more_than_allowed(
    perplexities: dict[int, float], dense: float, max_loss: float
) -> None:
    policy = POLICY.with_measured(Measured(qualities({**perplexities, 8: dense})))
    depth = policy.with_present_level("fast").resolve(Auto(max_loss))[1].decode_layers
    good = {8} | {d for d, p in perplexities.items() if p / dense - 1 <= max_loss}
    assert depth == min(d for d in good if d >= 4)


def test_the_two_kinds_of_requests_have_present_levels_of_their_own() -> None:
    under_load = POLICY.with_present_level("generative", "fast")
    assert under_load.is_degraded
    assert under_load.resolve(Auto())[1] == ServedDepth(5, 8, Reason.DEGRADED)
    layers, served = under_load.resolve(Auto(), kind=RequestKind.SCORE)
    assert served == ServedDepth(4, 4, Reason.DEGRADED)
    assert layers == POLICY.selection(DepthPair(4, 4))
    for kind in RequestKind:
        assert under_load.resolve(Layers(7), kind=kind)[1] == ServedDepth(7, 7, Reason.REQUESTED)
        assert under_load.resolve(None, kind=kind)[1] == ServedDepth(8, 8, Reason.DEFAULT)
    # A request's own limit holds for both.
    measured = under_load.with_measured(Measured(qualities({8: 10.0, 4: 20.0})))
    strict = measured.resolve(Auto(0.5), kind=RequestKind.SCORE)[1]
    assert strict == ServedDepth(8, 8, Reason.AUTO)
    only_scores = POLICY.with_present_level("dense", "fast")
    assert only_scores.is_degraded
    assert only_scores.resolve(Auto())[1].reason is Reason.AUTO
    assert not POLICY.is_degraded
    for changed in (under_load.with_levels(LEVELS, None), under_load.with_auto_level("fast")):
        assert changed.present_level == changed.present_score_level == changed.auto_level
    with pytest.raises(UnknownLevel):
        POLICY.with_present_level("dense", "slow")


def test_degraded_is_what_load_made_of_it() -> None:
    under_load = POLICY.with_present_level("fast")
    assert under_load.resolve(Auto())[1] == ServedDepth(4, 4, Reason.DEGRADED)
    # Nobody else is.
    assert under_load.resolve(None)[1] == ServedDepth(8, 8, Reason.DEFAULT)
    assert under_load.resolve(Layers(7))[1] == ServedDepth(7, 7, Reason.REQUESTED)
    assert under_load.resolve(Layers(7), Auto())[1] == ServedDepth(4, 7, Reason.REQUESTED)
    by_default = under_load.with_auto_by_default(True)
    assert by_default.resolve(None)[1] == ServedDepth(4, 4, Reason.DEGRADED)
    assert by_default.with_present_level("dense").resolve(None)[1].reason is Reason.AUTO
    assert by_default.resolve(NamedLevel("dense"))[1] == ServedDepth(8, 8, Reason.REQUESTED)
    with pytest.raises(UnknownLevel):
        POLICY.with_present_level("slow")


def test_auto_within_a_quality_loss_needs_measurements() -> None:
    with pytest.raises(FailedPrecondition, match="the dense model has not been measured"):
        POLICY.resolve(Auto(0.1))


def test_a_new_plan_forgets_quality_and_keeps_speed() -> None:
    speeds = {DepthPair(4, 4): Speed(100.0, 2.0, 8)}
    measured = POLICY.with_measured(Measured(qualities({8: 16.0}), speeds))
    replaced = measured.with_plan(plan(ORDER[::-1]))
    assert dict(replaced.qualities) == {}
    assert dict(replaced.speeds) == speeds
    assert replaced.resolve(Layers(7))[0] == LayerSelection((0,), (0,))
    assert measured.resolve(Layers(7))[0] == LayerSelection((5,), (5,))


def test_new_levels_keep_default_and_auto_where_they_exist() -> None:
    policy = DepthPolicy(plan(), LEVELS, default_level="fast", auto_level="generative")
    levels = (Level("thin", 2, 2), Level("fast", 3, 3))
    replaced = policy.with_levels(levels, None)
    assert (replaced.default_level, replaced.auto_level) == ("fast", "fast")
    assert replaced.resolve(None)[1] == ServedDepth(3, 3, Reason.DEFAULT)
    replaced = policy.with_levels(levels[:1], None)
    assert (replaced.default_level, replaced.auto_level) == ("thin", "thin")
    assert policy.with_levels(levels, "thin").default_level == "thin"
    with pytest.raises(UnknownLevel, match="no level 'dense'; the levels are thin, fast"):
        policy.with_levels(levels, "dense")


def test_a_policy_needs_levels_and_a_default_among_them() -> None:
    with pytest.raises(InvalidArgument):
        DepthPolicy(plan(), ())
    with pytest.raises(UnknownLevel):
        DepthPolicy(plan(), LEVELS, default_level="slow")


DEDICATED = DepthPolicy(plan(), (Level("full", 8, 8), Level("half", 4, 4)), any_depth=False)


@given(st.integers(1, 8))
def test_without_any_depth_those_of_levels_are_served_alone(depth: int) -> None:
    if depth in (8, 4):
        selection, served = DEDICATED.resolve(Layers(depth))
        assert served.decode_layers == served.prefill_layers == depth
        assert selection in DEDICATED.level_selections().values()
        return
    with pytest.raises(InvalidArgument) as caught:
        DEDICATED.resolve(Layers(depth))
    assert str(caught.value) == (
        f"depth.layers: got {depth}, allowed: the depth of a level: 8 (full), 4 (half)"
    )


def test_without_any_depth_prompt_and_answer_have_the_same() -> None:
    assert DEDICATED.resolve(Layers(8), Layers(8))[1].prefill_layers == 8
    with pytest.raises(InvalidArgument, match="prefill_depth: got 4, allowed: 8 layers"):
        DEDICATED.resolve(Layers(8), Layers(4))
    with pytest.raises(InvalidArgument, match=r"levels\.split\.prefill_depth: got 4, allowed: 8"):
        DEDICATED.with_levels((Level("split", 4, 8),), None)


def test_without_any_depth_measurements_go_with_their_level() -> None:
    measured = DEDICATED.with_measured(Measured(qualities({8: 10.0, 4: 12.0})))
    measured = measured.with_auto_level("half")
    assert measured.resolve(Auto(0.5))[1].decode_layers == 4
    assert measured.resolve(Auto(0.1))[1].decode_layers == 8
    left = measured.with_levels((Level("full", 8, 8),), None)
    assert left.qualities.keys() == {DepthPair(8, 8)}
    assert left.resolve(Auto(0.5))[1].decode_layers == 8


def test_healed_maps_serve_the_layers_they_were_trained_for() -> None:
    levels = (Level("dense", 8, 8), Level("fast", 4, 4), Level("prompt", 4, 8))
    policy = DepthPolicy(plan(), levels).with_repair("sha256:closed")
    skipped = policy.selection(DepthPair(4, 4)).decode_skips
    assert policy.healable_levels() == {skipped: [DepthPair(4, 4), DepthPair(4, 8)]}
    healed = policy.with_healed(skipped, "sha256:healed")
    for pair in (DepthPair(4, 4), DepthPair(4, 8), DepthPair(8, 4)):
        assert healed.selection(pair).repair == "sha256:healed", pair
    for pair in (DepthPair(5, 5), DepthPair(4, 5), DepthPair(5, 4)):
        assert healed.selection(pair).repair == "sha256:closed", pair
    assert healed.selection(healed.dense).repair is None
    assert healed.without_maps("sha256:healed").selection(DepthPair(4, 4)).repair == "sha256:closed"
    plain = healed.without_maps("sha256:closed")
    assert plain.selection(DepthPair(4, 4)).repair == "sha256:healed"
    assert plain.selection(DepthPair(5, 5)).repair is None


def test_measurements_stay_where_the_maps_do() -> None:
    levels = (Level("dense", 8, 8), Level("fast", 4, 4))
    policy = DepthPolicy(plan(), levels)
    pairs = [DepthPair(layers, layers) for layers in (8, 5, 4)]
    speed = Speed(100.0, 1.0, 8)
    measured = Measured(dict.fromkeys(pairs, quality(10.0)), dict.fromkeys(pairs, speed))
    policy = policy.with_measured(measured)
    skipped = policy.selection(DepthPair(4, 4)).decode_skips
    healed = policy.with_healed(skipped, "sha256:healed")
    assert list(healed.qualities) == list(healed.speeds) == pairs[:2]
