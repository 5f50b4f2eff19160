"""The better one of two orders of the layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.metrics.names import BLOCK_INFLUENCE, GREEDY_KL
from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.order_choice import OrderLosses, better, mean_losses, preferred
from server.depth.levels import DepthPair
from server.engine.base import LayerSelection, ProgressCallback
from server.errors import InvalidArgument
from tests.server.calibration.searched_engine import SearchedEngine, greedy_order
from tests.server.calibration.test_served_metrics import FixedDepths
from tests.server.rpc.toy_engine import ToyEngine

MEASURES = ("perplexity", "writing", "choosing")
LOSSES = st.dictionaries(st.sampled_from(MEASURES), st.floats(-1, 1), max_size=3)


def losses(**by_measure: float) -> OrderLosses:
    return OrderLosses("m", by_measure)


@given(LOSSES, LOSSES)
def test_more_measures_decide(mine: dict[str, float], other: dict[str, float]) -> None:
    first, second = OrderLosses("first", mine), OrderLosses("second", other)
    both = mine.keys() & other.keys()
    wins = sum(other[each] < mine[each] for each in both)
    defeats = sum(other[each] > mine[each] for each in both)
    assert better(first, second) is (second if wins > defeats else first)


def test_what_was_not_taken_prefers_nothing() -> None:
    first, second = losses(perplexity=1.0), losses(perplexity=0.5, writing=0.1)
    assert preferred(first, second, "perplexity") is second
    assert preferred(first, second, "writing") is None
    assert preferred(first, losses(perplexity=1.0), "perplexity") is None


def quality(perplexity: float) -> Quality:
    return Quality(perplexity, 0.1, 0.9, 0.1, 100)


def probes(ratio: float, repeated: float, accuracy: float) -> Probes:
    return Probes(
        Writing(ratio, 1.0, ratio, 0.1, repeated, 0.25, 0.5, 16, 768),
        Choosing(accuracy, 0.05, 0.9, 0.05, 64, 0.25),
    )


def test_mean_losses() -> None:
    found = mean_losses(
        "m",
        [quality(20), quality(40)],
        quality(10),
        [probes(1.5, 0.25, 0.75), probes(3.0, 0.75, 0.5)],
        probes(1.0, 0.25, 0.875),
    )
    assert found.losses == {
        "perplexity": pytest.approx((math.log(2) + math.log(4)) / 2),
        "writing": pytest.approx((math.log(1.5) + math.log(3) + 0.5) / 2),
        "choosing": pytest.approx((0.125 + 0.375) / 2),
    }
    nothing = Probes(None, None)
    found = mean_losses("m", [quality(20)], quality(10), [nothing], nothing)
    assert found.losses.keys() == {"perplexity"}


class TwoOrders(SearchedEngine):
    """Gives greedy removal's order another perplexity on text than Block Influence's."""

    greedy_perplexity = 11.0

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        qualities = await super().measure_quality(windows, selections, progress)

        def perplexity(skips: tuple[int, ...]) -> float:
            if not skips:
                return 10.0
            is_greedy = list(skips) == sorted(greedy_order(len(skips)))
            return self.greedy_perplexity if is_greedy else 12.0

        return [
            replace(each, perplexity=perplexity(layers.decode_skips))
            for layers, each in zip(selections, qualities, strict=True)
        ]


def calibrator(engine: ToyEngine, search_tokens: int = 1 << 19) -> Calibrator:
    return Calibrator(
        engine,
        model_fingerprint="sha256:model",
        versions={"toy": "1"},
        texts=["abc" * 1000, "xyz" * 10],
        max_tokens=1200,
        # Too little for probes: perplexity alone decides.
        held_out_texts=["held out " * 20],
        max_held_out_tokens=200,
        every_depth=False,
        metric="auto",
        search_tokens=search_tokens,
    )


@pytest.mark.parametrize(
    ("perplexity", "taken", "other"),
    [(11.0, GREEDY_KL, BLOCK_INFLUENCE), (13.0, BLOCK_INFLUENCE, GREEDY_KL)],
)
async def test_the_better_order_is_taken(
    perplexity: float, taken: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TwoOrders()
    engine.greedy_perplexity = perplexity
    await engine.start()
    caplog.set_level(logging.INFO)
    seen: list[Progress] = []
    depths = [DepthPair(8, 8), DepthPair(5, 5), DepthPair(6, 8)]
    plan = await calibrator(engine).measure_plan(seen.append, depths=depths, repair="sha256:maps")
    assert plan.metric == taken
    assert plan.other_scores.keys() == {
        *("relative_magnitude", "norm", "angular_distance", GREEDY_KL)
    }, "the scores of both are kept"
    assert (list(plan.removal_order[:4]) == greedy_order(4)) is (taken == GREEDY_KL)
    compared = engine.calls[-1]
    assert compared[0] == LayerSelection()
    assert [len(each.decode_skips) for each in compared[1:]] == [3, 0] * 2
    assert [len(each.prefill_skips) for each in compared[1:]] == [3, 2] * 2
    assert {each.repair for each in compared[1:]} == {"sha256:maps"}
    assert (
        f"in the order of {taken} rather than of {other}; mean losses at depths 5, 6/8: perplexity"
        in caplog.text
    )
    phases = dict.fromkeys(each.phase for each in seen)
    assert list(phases) == ["importance", "search", "orders"]
    steps = [(each.done, each.total) for each in seen if each.phase == "orders"]
    assert steps == sorted(steps)
    assert steps[-1] == (1000, 1000)


async def test_without_pruned_levels_some_depths_are_tried() -> None:
    engine = TwoOrders()
    await engine.start()
    await calibrator(engine).measure_plan(lambda _: None, depths=[DepthPair(8, 8)])
    assert [len(each.decode_skips) for each in engine.calls[-1]] == [0, 1, 2, 3, 1, 2, 3]


async def test_a_search_that_the_tokens_do_not_allow(caplog: pytest.LogCaptureFixture) -> None:
    engine = TwoOrders()
    await engine.start()
    plan = await calibrator(engine, search_tokens=64).measure_plan(lambda _: None)
    assert plan.metric == BLOCK_INFLUENCE
    assert "layers are ranked by block_influence: search_tokens: got 64, allowed:" in caplog.text
    assert engine.calls == []


async def test_an_engine_that_cannot_search_ranks_by_block_influence() -> None:
    engine = FixedDepths()
    await engine.start()
    plan = await calibrator(engine).measure_plan(lambda _: None)
    assert plan.metric == BLOCK_INFLUENCE


async def test_text_that_cannot_be_measured_on_is_refused() -> None:
    engine = TwoOrders()
    await engine.start()
    with pytest.raises(InvalidArgument, match=r"^texts: got \[''\]"):
        await calibrator(engine).measure_plan(lambda _: None, [""])
