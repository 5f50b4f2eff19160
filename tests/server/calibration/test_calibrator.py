"""Measurements, and the texts that they use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from pruning.importance import ImportanceError
from pruning.metrics import METRICS, DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality
from pruning.text import TextError
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.order_stability import OrderStability
from server.calibration.text_windows import WINDOW, text_windows
from server.depth.levels import DepthPair
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from server.engine.base import IsEnough, LayerSelection, ProgressCallback, never_enough
from server.engine.measuring import importance_parts
from server.errors import FailedPrecondition, InvalidArgument
from tests.server.calibration.searched_engine import SearchedEngine, greedy_order
from tests.server.rpc.conftest import LEVELS, make_plan
from tests.server.rpc.toy_engine import BOS, MODEL, ToyEngine, toy_sums

OF_ONE_PASS = {"relative_magnitude", "norm", "angular_distance"}


class RecordingEngine(ToyEngine):
    """Keeps the windows it is given, and may find the states of the model not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[list[int]] = []
        self.not_finite = False

    async def measure_importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        if self.not_finite:
            raise ImportanceError("layer 3: the block influence is not finite")
        self.windows = [list(window) for window in windows]
        return await super().measure_importance(windows, progress, is_enough)

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        self.windows = [list(window) for window in windows]
        return await super().measure_quality(windows, selections, progress)


@pytest.fixture
async def engine() -> RecordingEngine:
    engine = RecordingEngine()
    await engine.start()
    return engine


def make_calibrator(
    engine: ToyEngine, held_out: str = "held out " * 99, max_held_out_tokens: int = 500
) -> Calibrator:
    return Calibrator(
        engine,
        model_fingerprint="sha256:model",
        versions={"toy": "1"},
        texts=["abc" * 1000, "xyz" * 10],
        max_tokens=1200,
        held_out_texts=[held_out],
        max_held_out_tokens=max_held_out_tokens,
        every_depth=False,
    )


class OutgrownEngine(RecordingEngine):
    """Has a tokenizer with one token more than the model knows."""

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        ids = super().tokenize(text, special_tokens=special_tokens)
        return [MODEL.vocab_size if token_id == ord("~") else token_id for token_id in ids]


def ignore(progress: Progress) -> None:
    pass


async def test_every_window_begins_as_a_text_does(engine: RecordingEngine) -> None:
    plan = await make_calibrator(engine).measure_plan(ignore)
    text = ("abc" * 1000).encode()
    length = WINDOW - 1
    # The first window of each document, then the second of each, 1200 tokens of text in all.
    assert engine.windows == [
        [BOS, *text[:length]],
        [BOS, *("xyz" * 10).encode()],
        [BOS, *text[length : 2 * length]],
        [BOS, *text[2 * length : 2 * length + 1200 - 2 * length - 30]],
    ]
    assert plan.num_tokens == 1200 + 4
    assert (plan.model_fingerprint, plan.versions) == ("sha256:model", {"toy": "1"})


async def test_the_text_decides_the_fingerprint(engine: RecordingEngine) -> None:
    calibrator = make_calibrator(engine)
    own = await calibrator.measure_plan(ignore)
    given = await calibrator.measure_plan(ignore, ["something else"])
    again = await calibrator.measure_plan(ignore)
    assert own.text_fingerprint == again.text_fingerprint != given.text_fingerprint


async def test_orders_that_need_no_measurement_carry_block_influence(
    engine: RecordingEngine,
) -> None:
    calibrator = make_calibrator(engine)
    influence = await calibrator.measure_plan(ignore)
    plan = await calibrator.measure_plan(ignore, metric="sequential")
    assert plan.metric == "sequential"
    assert plan.removal_order == tuple(range(8))
    assert plan.other_scores == {
        **influence.other_scores,
        "sequential": tuple(map(float, range(8))),
    }
    assert influence.other_scores.keys() == OF_ONE_PASS
    assert (plan.scores, plan.stderrs) == (influence.scores, influence.stderrs)


@pytest.mark.parametrize("metric", sorted(OF_ONE_PASS))
async def test_metrics_of_the_same_pass_cost_nothing_more(
    engine: RecordingEngine, metric: str
) -> None:
    calibrator = make_calibrator(engine)
    influence = await calibrator.measure_plan(ignore)
    plan = await calibrator.measure_plan(ignore, metric=metric)
    assert plan.metric == metric
    assert plan.other_scores == influence.other_scores
    if metric != "angular_distance":  # whose order is one of blocks
        scores = plan.other_scores[metric]
        assert plan.removal_order == tuple(sorted(range(8), key=scores.__getitem__))


DEPTHS = [DepthPair(8, 8), DepthPair(4, 6)]


class UnsureEngine(ToyEngine):
    """Finds two layers in turns the less important one, for as many windows as it is told."""

    def __init__(self, num_unsure: int) -> None:
        super().__init__()
        self.num_unsure = num_unsure

    async def measure_importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        groups: list[DensePassSums] = []
        for part in importance_parts(windows):
            for group in part:
                scores = [float(layer + 1) for layer in range(8)]
                if len(groups) < self.num_unsure:
                    # Depth 4 skips layers 0 to 3, or 0 to 2 and 4.
                    scores[3:5] = (5.0, 4.0) if len(groups) % 2 else (4.0, 5.0)
                groups.append(toy_sums(scores, sum(map(len, group))))
            progress(len(groups), len(windows))
            if await is_enough(groups):
                break
        return groups


async def plan_of(
    engine: ToyEngine, *, until_settled: bool = True, metric: str | None = None
) -> Plan:
    await engine.start()
    calibrator = Calibrator(
        engine,
        model_fingerprint="sha256:model",
        versions={},
        texts=["x" * 40 * (WINDOW - 1)],
        max_tokens=40 * (WINDOW - 1),
        held_out_texts=["held out " * 99],
        max_held_out_tokens=500,
        every_depth=False,
        until_settled=until_settled,
    )
    return await calibrator.measure_plan(ignore, metric=metric, depths=DEPTHS)


async def test_ranking_ends_when_the_order_is_settled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plan = await plan_of(UnsureEngine(0))
    assert (plan.num_tokens, plan.settled) == (16 * WINDOW, True)
    assert "settled after 8192 tokens" in caplog.text
    whole = await plan_of(UnsureEngine(0), until_settled=False)
    assert (whole.num_tokens, whole.settled) == (40 * WINDOW, True)
    assert whole.removal_order == plan.removal_order
    again = await plan_of(UnsureEngine(0))
    assert replace(again, created_at=0) == replace(plan, created_at=0)


async def test_an_order_that_never_settles_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    plan = await plan_of(UnsureEngine(40))
    assert (plan.num_tokens, plan.settled) == (40 * WINDOW, False)
    assert "block_influence: 20480 tokens are too few to be sure" in caplog.text
    assert "at depth 4, " in caplog.text
    assert "they differ in the layers 3, 4." in caplog.text


async def test_what_the_levels_do_not_use_need_not_be_settled() -> None:
    engine = UnsureEngine(40)
    await engine.start()
    assert (await plan_of(engine, metric="sequential")).settled is None, "no text decides"
    stability = OrderStability(METRICS["block_influence"], 8, [DepthPair(3, 3), DepthPair(8, 8)])
    sums = await engine.measure_importance([[1, 2, 3]] * 20, lambda *_: None)
    assert await stability.is_settled(sums)
    unused = OrderStability(METRICS["block_influence"], 8, [DepthPair(8, 8)])
    assert not await unused.is_settled(sums)
    assert await unused.told(sums) is None


async def test_a_search_carries_block_influence_and_its_own_scores() -> None:
    engine = SearchedEngine()
    await engine.start()
    seen: list[Progress] = []
    plan = await make_calibrator(engine).measure_plan(
        seen.append, metric="greedy_kl", repair="sha256:maps"
    )
    assert plan.metric == "greedy_kl"
    assert list(plan.removal_order[:4]) == greedy_order(4)
    assert plan.other_scores.keys() == {*OF_ONE_PASS, "greedy_kl"}
    assert plan.num_tokens == 1200 + 4, "Block Influence is measured on all of the text"
    assert {progress.phase for progress in seen} == {"importance", "search"}
    assert {layers.repair for layers in engine.measured} == {"sha256:maps"}


async def test_text_that_is_too_little_for_a_search(engine: RecordingEngine) -> None:
    calibrator = make_calibrator(engine)
    with pytest.raises(InvalidArgument, match=r"^texts: got \['abc'\].*3 tokens of it can be used"):
        await calibrator.measure_plan(ignore, ["abc"], metric="greedy_kl")
    assert engine.windows == [], "nothing is measured before that is known"


async def test_what_cannot_be_measured(engine: RecordingEngine) -> None:
    with pytest.raises(FailedPrecondition, match="held-out text"):
        make_calibrator(engine, held_out="")
    calibrator = make_calibrator(engine)
    with pytest.raises(InvalidArgument, match=r"^texts: got \[''\]"):
        await calibrator.measure_plan(ignore, [""])
    engine.not_finite = True
    with pytest.raises(FailedPrecondition, match="layer 3: the block influence is not finite"):
        await calibrator.measure_plan(ignore)


async def test_a_token_that_the_model_does_not_know() -> None:
    """It would end the engine."""
    engine = OutgrownEngine()
    await engine.start()
    problem = r"\('b~'\.\.\.\) has the token 258, allowed: 0 to 257, the model's vocabulary"
    with pytest.raises(FailedPrecondition, match=f"^the held-out text: text 1 {problem}"):
        make_calibrator(engine, held_out="b~")
    calibrator = make_calibrator(engine)
    with pytest.raises(InvalidArgument, match=rf"^texts: .*\(text 2 {problem}"):
        await calibrator.measure_plan(ignore, ["abc", "b~"])
    assert engine.windows == []


@pytest.mark.parametrize("num_characters", [4, 5, 100, 256, WINDOW - 1, WINDOW])
async def test_little_held_out_text_makes_two_windows(
    engine: RecordingEngine, num_characters: int
) -> None:
    policy = DepthPolicy(make_plan(), LEVELS)
    calibrator = make_calibrator(engine, held_out="x" * num_characters, max_held_out_tokens=10**30)
    await calibrator.measure_quality(policy, [policy.dense], ignore)
    first, second = engine.windows
    assert len(first) + len(second) == num_characters + 2
    assert first[0] == second[0] == BOS


async def test_too_little_held_out_text(engine: RecordingEngine) -> None:
    with pytest.raises(FailedPrecondition, match="3 tokens of it can be used, allowed: 4 or more"):
        make_calibrator(engine, held_out="xyz")


async def test_the_fewest_tokens_that_the_settings_allow(engine: RecordingEngine) -> None:
    policy = DepthPolicy(make_plan(), LEVELS)
    calibrator = make_calibrator(engine, max_held_out_tokens=64)
    await calibrator.measure_quality(policy, [policy.dense], ignore)
    assert [len(window) for window in engine.windows] == [33, 33]


async def test_short_lines_are_text(engine: RecordingEngine) -> None:
    plan = await make_calibrator(engine).measure_plan(ignore, ["ab", "cd", "e"])
    assert engine.windows == [[BOS, *b"ab"], [BOS, *b"cd"]]
    assert plan.num_tokens == 6


def test_a_context_without_room_for_text() -> None:
    def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
        return [BOS] * special_tokens + list(text.encode())

    def windows(max_context: int) -> list[list[int]]:
        return text_windows(
            tokenize, ["abc"], max_context=max_context, max_tokens=9, vocab_size=257
        )

    with pytest.raises(TextError, match=r"^max_context: a context of 3 .* allowed: 4 or more$"):
        windows(3)
    assert windows(4) == [[BOS, *b"ab"]]
    with pytest.raises(TextError, match="begins every text with the token 256, allowed: 0 to 255"):
        text_windows(tokenize, ["abc"], max_context=9, max_tokens=9, vocab_size=256)


async def test_speed_is_measured_beside_dense(engine: RecordingEngine) -> None:
    policy = DepthPolicy(make_plan(), LEVELS)
    calibrator = make_calibrator(engine)
    seen: list[Progress] = []
    speeds = await calibrator.measure_speed(policy, [DepthPair(4, 4)], seen.append)
    assert speeds.keys() == {DepthPair(8, 8), DepthPair(4, 4)}
    assert speeds[DepthPair(8, 8)].speedup == 1
    ratio = speeds[DepthPair(4, 4)].tokens_per_second / speeds[DepthPair(8, 8)].tokens_per_second
    assert speeds[DepthPair(4, 4)].speedup == ratio
    assert [(progress.done, progress.total) for progress in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    assert len(engine.requests) == 2 * 2 * 8
    # The depths take turns.
    depths = [request.layers for request in engine.requests[::8]]
    assert depths[:2] == depths[2:] == [policy.selection(pair) for pair in speeds]
    assert all(request.sampling.ignore_eos for request in engine.requests)
    measured = policy.with_measured(Measured(speeds=speeds))
    assert await calibrator.measure_speed(measured, [], ignore) == {}


async def test_depths_to_measure(engine: RecordingEngine) -> None:
    policy = DepthPolicy(make_plan(), LEVELS[1:])
    assert make_calibrator(engine).depths_to_measure(policy) == [
        DepthPair(8, 8),
        DepthPair(4, 8),
        DepthPair(4, 4),
    ]
