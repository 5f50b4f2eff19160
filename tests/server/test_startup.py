"""The steps of a start, with a toy engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pruning.quality import Quality
from pruning.repair import load_maps, maps_fingerprint, save_maps
from server.config import load_settings
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus, StandIn
from server.engine.base import LayerSelection, ProgressCallback
from server.model.inputs import Inputs, StartError
from server.model.source import ModelSource
from server.serving.service import Service
from server.serving.service_state import State
from server.startup import Startup
from server.telemetry.metrics import Metrics
from server.telemetry.progress import ProgressReport
from tests.server.calibration.repairing_engine import RepairingEngine
from tests.server.calibration.searched_engine import SearchedEngine, greedy_order
from tests.server.rpc.conftest import LEVELS
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine


class Start:
    """A start of a server whose state is kept in ``directory``."""

    def __init__(
        self,
        directory: Path,
        calibration_text: str = "calibration text " * 20,
        engine: ToyEngine | None = None,
        first_restart_delay: float = 0.5,
        **settings: str,
    ) -> None:
        self.engine = ToyEngine() if engine is None else engine
        self.service = Service(
            self.engine, Metrics(), first_restart_delay=first_restart_delay, poll_seconds=0.05
        )
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
        chosen = load_settings({"state_dir": str(directory), **settings})
        progress = ProgressReport(Console(file=io.StringIO()))
        self.startup = Startup(chosen, inputs, self.engine, self.service, progress)


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
    assert {level.depths for level in LEVELS} <= policy.probes.keys()
    phases = ["engine", "plan", "quality", "probes", "speed"]
    assert list(start.service.status().startup_seconds) == phases

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


async def served(directory: Path, engine: ToyEngine) -> tuple[DepthPolicy, RepairStatus]:
    start = Start(directory, engine=engine, repair="closed-form")
    try:
        await start.startup.run()
        return start.service.policy, start.service.repair
    finally:
        await start.service.close()


async def started(directory: Path, engine: ToyEngine) -> DepthPolicy:
    policy, _ = await served(directory, engine)
    return policy


async def test_repair_is_fitted_once_and_kept(tmp_path: Path) -> None:
    engine = RepairingEngine()
    policy = await started(tmp_path, engine)
    assert engine.num_fits == 1
    assert policy.repair == engine.installed is not None
    fast, dense = DepthPair(4, 4), policy.dense
    assert policy.selection(fast).repair == policy.repair
    assert policy.selection(dense).repair is None, "nothing is skipped"
    [kept] = tmp_path.glob("repair-*.safetensors")
    assert maps_fingerprint(kept) == policy.repair
    assert policy.qualities[fast].kl_nats == pytest.approx(0.02), "measured with repair"
    assert {level.depths for level in LEVELS} <= policy.qualities.keys() & policy.speeds.keys()

    again = RepairingEngine()
    assert await started(tmp_path, again) == policy
    assert (again.num_fits, again.installed, again.num_steps) == (0, policy.repair, 0)


async def test_repair_that_is_damaged_or_foreign_is_fitted_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = await started(tmp_path, RepairingEngine())
    [kept] = tmp_path.glob("repair-*.safetensors")
    foreign = replace(load_maps(kept), model_fingerprint="sha256:other")
    sound = kept.read_bytes()
    for damage in (
        lambda: kept.write_bytes(sound[:-1]),
        lambda: kept.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1])),
        lambda: save_maps(foreign, kept),
    ):
        damage()
        caplog.clear()
        engine = RepairingEngine()
        assert (await started(tmp_path, engine)).repair == policy.repair
        assert engine.num_fits == 1
        assert f"{kept} is not used and will be made anew" in caplog.text


async def test_repair_that_does_not_help_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy, status = await served(tmp_path, RepairingEngine(remaining=1.5))
    assert policy.repair is None
    assert policy.selection(DepthPair(4, 4)).repair is None
    assert policy.qualities[DepthPair(4, 4)].kl_nats == pytest.approx(0.04)
    assert "repair is not used: the levels are 0.045 nats from the dense model with it" in (
        caplog.text
    )
    assert (status.wanted, status.in_force) == (StandIn.CLOSED_FORM, None)
    assert status.problem.startswith("repair is not used: the levels are 0.045 nats from the")


async def test_repair_in_force_is_described(tmp_path: Path) -> None:
    policy, status = await served(tmp_path, RepairingEngine())
    repair = status.in_force
    assert (status.wanted, status.problem) == (StandIn.CLOSED_FORM, "")
    assert repair is not None
    assert repair.fingerprint == policy.repair
    assert repair.num_bytes == NUM_LAYERS * 4 * 4 * 4
    assert (repair.num_tokens, repair.unexplained) == (64, dict.fromkeys(range(NUM_LAYERS), 0.5))
    assert status.kl_nats == pytest.approx(0.015)
    assert status.kl_nats_without == pytest.approx(0.03)
    _, again = await served(tmp_path, RepairingEngine())
    assert again == status


async def test_too_little_text_to_fit_repair_is_refused(tmp_path: Path) -> None:
    engine = RepairingEngine()
    start = Start(tmp_path, "short", engine=engine, repair="closed-form")
    with pytest.raises(StartError, match=r"^repair: text: got 6 tokens to fit repair on, allowed"):
        await start.startup.run()
    await start.service.close()


async def test_a_search_that_dies_goes_on_at_the_next_start(tmp_path: Path) -> None:
    engine = SearchedEngine(num_lives=4)
    first = Start(tmp_path, engine=engine, metric="greedy_kl")
    with pytest.raises(StartError, match=r"^the engine has died while measuring: killed$"):
        await first.startup.run()
    await first.service.close()

    again = SearchedEngine()
    start = Start(tmp_path, engine=again, metric="greedy_kl")
    await start.startup.run()
    plan = start.service.policy.plan
    await start.service.close()
    assert plan.metric == "greedy_kl"
    assert list(plan.removal_order[: NUM_LAYERS // 2]) == greedy_order(NUM_LAYERS // 2)
    assert len(engine.measured) > NUM_LAYERS
    # The last call is for the quality of the depths.
    searched = [layers for call in again.calls[:-1] for layers in call]
    assert searched
    assert not set(engine.measured) & set(searched)

    third = Start(tmp_path, engine=SearchedEngine(), metric="greedy_kl")
    await third.startup.run()
    assert third.service.policy.plan == plan
    assert third.engine.num_steps == 0
    await third.service.close()


async def test_another_metric_makes_another_plan(tmp_path: Path) -> None:
    orders = []
    for metric in ("sequential", "reverse_order", "block_influence", "sequential"):
        start = Start(tmp_path, metric=metric)
        await start.startup.run()
        assert start.service.policy.plan.metric == metric
        orders.append(start.service.policy.plan.removal_order)
        await start.service.close()
    assert orders[0] == orders[3] == orders[1][::-1] != orders[2]
    assert len(list(tmp_path.glob("plan-*.json"))) == 3


class SearchedRepairingEngine(RepairingEngine):
    """Records with which repair the layers were left out in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.repairs: list[set[str | None]] = []

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        self.repairs.append({layers.repair for layers in selections})
        return await super().measure_quality(windows, selections, progress)


class FixedDepths(ToyEngine):
    name = "dedicated"
    serves_any_depth = False


async def test_a_search_with_an_engine_that_runs_levels_alone(tmp_path: Path) -> None:
    start = Start(tmp_path, engine=FixedDepths(), metric="greedy_kl")
    with pytest.raises(
        StartError,
        match=r"^metric: got 'greedy_kl', allowed: block_influence, reverse_order, sequential; ",
    ):
        await start.startup.run()
    await start.service.close()


async def test_a_search_counts_on_the_repair_that_is_served(tmp_path: Path) -> None:
    engine = SearchedRepairingEngine()
    start = Start(tmp_path, engine=engine, repair="closed-form", metric="single_removal_kl")
    await start.startup.run()
    assert start.service.policy.plan.metric == "single_removal_kl"
    assert start.service.policy.repair == engine.installed is not None
    assert engine.repairs[0] == {engine.installed}, "the search comes first"
    await start.service.close()


async def test_a_search_that_counted_on_repair_in_vain_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RepairingEngine(remaining=1.5)
    start = Start(tmp_path, engine=engine, repair="closed-form", metric="single_removal_kl")
    await start.startup.run()
    assert start.service.policy.repair is None
    assert "the search for the layers to leave out has counted on repair" in caplog.text
    await start.service.close()


async def test_without_the_setting_nothing_is_fitted(tmp_path: Path) -> None:
    engine = RepairingEngine()
    start = Start(tmp_path, engine=engine)
    await start.startup.run()
    assert (engine.num_fits, engine.installed, start.service.policy.repair) == (0, None, None)
    await start.service.close()
