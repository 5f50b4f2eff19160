"""The steps of a start, with a toy engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from server.config import load_settings
from server.model.inputs import Inputs, StartError
from server.model.source import ModelSource
from server.serving.service import Service
from server.serving.service_state import State
from server.startup import Startup
from server.telemetry.metrics import Metrics
from server.telemetry.progress import ProgressReport
from tests.server.rpc.conftest import LEVELS
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine


class Start:
    """A start of a server whose state is kept in ``directory``."""

    def __init__(self, directory: Path, calibration_text: str = "calibration text " * 20) -> None:
        self.engine = ToyEngine()
        self.service = Service(self.engine, Metrics())
        inputs = Inputs(
            source=ModelSource(directory, "toy"),
            fingerprint="sha256:model",
            tokenizer="sha256:tokenizer",
            num_layers=NUM_LAYERS,
            levels=LEVELS,
            default_level="fast",
            plan=None,
            texts=[calibration_text],
            held_out_texts=["held-out text " * 20],
        )
        settings = load_settings({"state_dir": str(directory)})
        progress = ProgressReport(Console(file=io.StringIO()))
        self.startup = Startup(settings, inputs, self.engine, self.service, progress)


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    start = Start(tmp_path)
    yield start
    await start.service.close()


async def test_a_start_measures_what_is_not_kept(start: Start, tmp_path: Path) -> None:
    await start.startup.run()
    assert start.service.state is State.SERVING
    policy = start.service.policy
    assert policy.default_level == "fast"
    assert {level.depths for level in LEVELS} <= policy.qualities.keys() & policy.speeds.keys()
    assert list(start.service.status().startup_seconds) == ["engine", "plan", "quality", "speed"]

    again = Start(tmp_path)
    await again.startup.run()
    try:
        assert again.service.policy == policy
        assert again.engine.num_steps == 0
    finally:
        await again.service.close()


async def test_an_engine_that_dies_in_the_first_calibration(start: Start) -> None:
    start.engine.gate.clear()
    running = asyncio.create_task(start.startup.run())
    while start.service.status().startup_phase != "plan":
        await asyncio.sleep(0.01)
    start.engine.die()
    with pytest.raises(StartError, match=r"^the engine has died while measuring: killed$"):
        await running
    assert start.service.state is State.STARTING


async def test_an_engine_that_cannot_start(start: Start) -> None:
    start.engine.num_failing_starts = 1
    with pytest.raises(StartError, match=r"^engine: no memory for the model$"):
        await start.startup.run()


async def test_calibration_text_without_tokens(tmp_path: Path) -> None:
    start = Start(tmp_path, calibration_text="x")
    with pytest.raises(StartError, match=r"^the calibration text: no text of 2 or more tokens"):
        await start.startup.run()
    await start.service.close()
