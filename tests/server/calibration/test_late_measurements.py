"""Measurements while serving that requests keep coming into."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext

import pytest

from pruning.quality import Quality
from server.calibration import late_measurements
from server.calibration.calibrator import Calibrator
from server.calibration.late_measurements import LateMeasurements
from server.calibration.measuring_steps import MeasuringSteps
from server.calibration.policy_in_force import PolicyInForce
from server.calibration.speed_meter import NUM_STREAMS
from server.depth.policy import DepthPolicy
from server.engine.base import (
    GenerationDelta,
    GenerationRequest,
    LayerSelection,
    ProgressCallback,
)
from server.telemetry.metrics import Metrics
from tests.server.rpc.conftest import LEVELS, make_plan
from tests.server.rpc.toy_engine import ToyEngine

NUM_POLLS = 20


async def many_polls() -> None:
    for _ in range(NUM_POLLS):
        await asyncio.sleep(0.01)


class SlowEngine(ToyEngine):
    """Takes as long as it takes to notice many times that a request has come."""

    def __init__(self) -> None:
        super().__init__()
        self.is_measuring = False
        self.num_given_up = 0
        # Requests whose first token has been waited for.
        self.num_timed = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Only speed is measured by requests here: there is too little text for probes."""
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                await many_polls()
                self.num_timed += 1
                yield delta

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        self.is_measuring = True
        try:
            await many_polls()
            return await super().measure_quality(windows, selections, progress)
        except asyncio.CancelledError:
            self.num_given_up += 1
            raise
        finally:
            self.is_measuring = False


@pytest.fixture(autouse=True)
def short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_measurements, "_CALM_SECONDS", 0.01)
    monkeypatch.setattr(late_measurements, "_POLL_SECONDS", 0.005)


async def test_quality_is_finished_after_a_few_interruptions_and_speed_is_left() -> None:
    """A request comes into every measurement, of quality and of speed."""
    engine = SlowEngine()
    await engine.start()
    in_force = PolicyInForce(Metrics())
    in_force.install(DepthPolicy(make_plan(), LEVELS))
    calibrator = Calibrator(
        engine,
        model_fingerprint="sha256:model",
        versions={},
        texts=["calibration text " * 20],
        max_tokens=200,
        held_out_texts=["held-out text " * 20],
        max_held_out_tokens=200,
        every_depth=False,
    )
    steps = MeasuringSteps(calibrator, None, lambda _: None)
    late = LateMeasurements(
        steps,
        in_force,
        is_busy=lambda: engine.is_measuring or engine.load().num_running > 0,
        awaits_repair=lambda: False,
        errors=nullcontext,
    )
    assert late.pending == [
        "speed of dense, generative, fast",
        "probes of dense, generative, fast",
        "quality of dense, generative, fast",
    ]
    task = asyncio.create_task(late.run())
    while not all(
        level.depths in in_force.policy.qualities and in_force.policy.is_probed(level.depths)
        for level in LEVELS
    ):
        assert not task.done()
        await asyncio.sleep(0.01)
    # Two depths in one step, and the third in another.
    assert engine.num_given_up == 2 * 3
    await engine.until_running(NUM_STREAMS)
    await engine.until_running(0)
    assert late.pending == ["speed of dense, generative, fast"]
    assert not in_force.policy.speeds
    assert engine.num_timed == 0
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
