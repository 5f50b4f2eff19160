"""What is measured, and on what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pruning.importance import BlockInfluence, ImportanceError
from server.calibration.calibrator import WINDOW, Calibrator, Progress
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.engine.base import ProgressCallback
from server.errors import FailedPrecondition, InvalidArgument
from tests.server.rpc.conftest import LEVELS, make_plan
from tests.server.rpc.toy_engine import BOS, ToyEngine


class RecordingEngine(ToyEngine):
    """Keeps the windows it is given, and may find the states of the model not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[list[int]] = []
        self.not_finite = False

    async def measure_importance(
        self, windows: Sequence[Sequence[int]], progress: ProgressCallback
    ) -> BlockInfluence:
        if self.not_finite:
            raise ImportanceError("layer 3: the block influence is not finite")
        self.windows = [list(window) for window in windows]
        return await super().measure_importance(windows, progress)


@pytest.fixture
async def engine() -> RecordingEngine:
    engine = RecordingEngine()
    await engine.start()
    return engine


def make_calibrator(engine: ToyEngine, held_out: str = "held out " * 99) -> Calibrator:
    return Calibrator(
        engine,
        model_fingerprint="sha256:model",
        versions={"toy": "1"},
        texts=["abc" * 1000, "xyz" * 10],
        max_tokens=1200,
        held_out_texts=[held_out],
        max_held_out_tokens=500,
        every_depth=False,
    )


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


async def test_what_cannot_be_measured(engine: RecordingEngine) -> None:
    with pytest.raises(FailedPrecondition, match="held-out text"):
        make_calibrator(engine, held_out="")
    calibrator = make_calibrator(engine)
    with pytest.raises(InvalidArgument, match=r"^texts: got \[''\]"):
        await calibrator.measure_plan(ignore, [""])
    engine.not_finite = True
    with pytest.raises(FailedPrecondition, match="layer 3: the block influence is not finite"):
        await calibrator.measure_plan(ignore)


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
    measured = policy.with_measurements({}, speeds)
    assert await calibrator.measure_speed(measured, [], ignore) == {}


async def test_depths_to_measure(engine: RecordingEngine) -> None:
    policy = DepthPolicy(make_plan(), LEVELS[1:])
    assert make_calibrator(engine).depths_to_measure(policy) == [
        DepthPair(8, 8),
        DepthPair(4, 8),
        DepthPair(4, 4),
    ]
