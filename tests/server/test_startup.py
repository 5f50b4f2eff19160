"""The steps of a start, with a toy engine."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pruning.quality import Quality
from pruning.repair import load_maps, maps_fingerprint, save_maps
from server.calibration import late_measurements
from server.calls.generation import FinishInfo, Generation, TokenPrompt
from server.config import load_settings
from server.depth.levels import DEFAULT_LEVELS, DepthPair, LevelSpec, Limit, spec_of
from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus, StandIn
from server.engine.base import LayerSelection, ProgressCallback, SamplingOptions
from server.errors import InvalidArgument, NonFiniteResult
from server.model.inputs import Inputs, StartError, chosen_levels
from server.model.source import ModelSource
from server.serving.service import Service
from server.serving.service_state import State
from server.startup import Startup
from server.telemetry.metrics import Metrics
from server.telemetry.progress import ProgressReport
from tests.server.calibration.repairing_engine import RepairingEngine
from tests.server.calibration.searched_engine import SearchedEngine, greedy_order
from tests.server.rpc.conftest import LEVELS
from tests.server.rpc.toy_engine import BOS, NUM_LAYERS, ToyEngine


class Start:
    """A start of a server whose state is kept in ``directory``."""

    def __init__(
        self,
        directory: Path,
        calibration_text: str = "calibration text " * 20,
        engine: ToyEngine | None = None,
        first_restart_delay: float = 0.5,
        levels: tuple[LevelSpec, ...] = tuple(map(spec_of, LEVELS)),
        default_level: str = "fast",
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
            levels=levels,
            default_level=default_level,
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
    depths = {level.depths for level in LEVELS}
    assert depths <= policy.qualities.keys() & policy.speeds.keys()
    assert not policy.probes, "they can wait"
    phases = ["engine", "plan", "quality", "speed", "probes"]
    assert list(start.service.status().startup_seconds) == phases
    await until(lambda: not start.service.status().unmeasured)
    policy = start.service.policy
    assert depths <= policy.probes.keys()

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
        match=r"^metric: got 'greedy_kl', allowed: block_influence, relative_magnitude, norm, "
        r"angular_distance, reverse_order, sequential; ",
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


class SteepEngine(ToyEngine):
    """A toy whose perplexity grows with every layer that is left out, and may be interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: list[int] = []
        # So many more calls of measure_quality find their model not finite.
        self.num_failing = 0

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        if self.num_failing:
            self.num_failing -= 1
            raise NonFiniteResult("depth 3")
        qualities = await super().measure_quality(windows, selections, progress)
        self.measured.append(len(selections))
        return qualities


def late_start(directory: Path, engine: ToyEngine | None = None, **settings: Any) -> Start:
    """Return a start with the default levels, which leaves all measurements for later."""
    chosen = {"startup_seconds": "0", **settings}
    return Start(
        directory,
        engine=engine or SteepEngine(),
        levels=DEFAULT_LEVELS,
        default_level="dense",
        **chosen,
    )


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def levels_of(start: Start) -> dict[str, tuple[int, int]]:
    levels = start.service.policy.levels
    return {level.name: (level.prefill_layers, level.decode_layers) for level in levels}


FOUND = {"dense": (8, 8), "fast": (6, 6), "turbo": (2, 2)}


@pytest.fixture(autouse=True)
def short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_measurements, "_CALM_SECONDS", 0.02)
    monkeypatch.setattr(late_measurements, "_POLL_SECONDS", 0.01)


async def test_levels_by_quality_are_found_at_a_start(tmp_path: Path) -> None:
    start = late_start(tmp_path, startup_seconds="inf")
    await start.startup.run()
    assert levels_of(start) == FOUND
    assert {level.depths for level in start.service.policy.levels} == (
        start.service.policy.speeds.keys()
    )
    status = start.service.status()
    assert (status.unmeasured, status.level_problems) == ((), ())
    await start.service.close()
    again = late_start(tmp_path)
    await again.startup.run()
    assert again.service.policy == start.service.policy
    assert (again.engine.num_steps, again.service.status().unmeasured) == (0, ())
    await again.service.close()


async def test_a_level_by_writing_is_found_at_a_start(tmp_path: Path) -> None:
    specs = (LevelSpec("full", 8), LevelSpec("chat", max_writing_loss=1e6))
    start = Start(
        tmp_path,
        engine=SteepEngine(),
        levels=specs,
        default_level="full",
        startup_seconds="inf",
    )
    await start.startup.run()
    policy = start.service.policy
    chat = policy.level("chat")
    assert chat.depths == DepthPair(1, 1), "it may lose as good as anything"
    assert chat.limits == {Limit.WRITING: 1e6}
    writing = policy.probes[chat.depths].writing
    assert writing is not None
    assert writing.loss is not None
    assert (start.service.status().unmeasured, start.service.status().level_problems) == ((), ())
    await start.service.close()


async def test_a_limit_of_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    specs = (LevelSpec("full", 8), LevelSpec("choose", max_choosing_loss=0.1))
    start = Start(tmp_path, engine=SteepEngine(), levels=specs)
    with pytest.raises(
        StartError,
        match=r"^levels\.choose\.max_choosing_loss: got 0\.1, allowed: a depth, or another limit: "
        "choosing is not measured, because the held-out text has 280 tokens .* 512 tokens or more",
    ):
        await start.startup.run()
    await start.service.close()


async def test_a_start_waits_for_the_levels_alone(tmp_path: Path) -> None:
    """What the optional level of the prompt takes, and every other depth, is measured later."""
    start = late_start(tmp_path, startup_seconds="1000")
    await start.startup.run()
    assert levels_of(start) == FOUND
    pending = ("level prompt", "probes of dense, fast, turbo")
    assert start.service.status().unmeasured == pending
    await until(lambda: not start.service.status().unmeasured)
    assert levels_of(start) == FOUND, "the toy is nothing without its prompt"
    await start.service.close()


async def test_what_a_start_has_no_time_for_is_measured_while_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start = late_start(tmp_path)
    await start.startup.run()
    assert start.service.state is State.SERVING
    assert levels_of(start) == {"dense": (8, 8)}
    assert start.service.status().unmeasured == (
        "level balanced",
        "level fast",
        "level turbo",
        "level prompt",
        "speed of dense",
        "probes of dense",
        "quality of dense, depth 7, depth 6, depth 5, depth 4, depth 3, depth 2, depth 1",
    )
    await until(lambda: not start.service.status().unmeasured)
    assert levels_of(start) == FOUND
    policy = start.service.policy
    assert {DepthPair(d, d) for d in range(1, 9)} <= policy.qualities.keys()
    assert {level.depths for level in policy.levels} <= policy.speeds.keys()
    assert "levels, now that they have been measured: dense=8, fast=6 (loss 0.25)" in caplog.text
    assert "to be measured while serving: level balanced; level fast;" in caplog.text
    assert "everything has been measured" in caplog.text
    assert isinstance(start.engine, SteepEngine)
    assert max(start.engine.measured) <= 2, "steps are small"
    await start.service.close()

    again = late_start(tmp_path)
    await again.startup.run()
    assert again.service.policy == policy
    assert (again.engine.num_steps, again.service.status().unmeasured) == (0, ())
    await again.service.close()


async def test_what_a_server_has_measured_before_its_end_is_kept(tmp_path: Path) -> None:
    start = late_start(tmp_path)
    await start.startup.run()
    await until(lambda: len(start.service.policy.qualities) >= 4)
    known = start.service.policy.qualities
    await start.service.close()
    again = late_start(tmp_path)
    await again.startup.run()
    assert known.items() <= again.service.policy.qualities.items()
    await until(lambda: not again.service.status().unmeasured)
    assert levels_of(again) == FOUND
    await again.service.close()


async def test_measurements_make_way_for_requests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "server.calibration")
    start = late_start(tmp_path)
    engine = start.engine
    await start.startup.run()
    engine.gate.clear()
    steps = engine.num_steps
    await until(lambda: engine.num_steps > steps)  # a measurement is under way
    request = Generation(TokenPrompt((BOS,)), sampling=SamplingOptions(max_tokens=2))
    async with start.service.inference.generate(request) as events:
        await until(lambda: "has made way for a request" in caplog.text)
        before = start.service.policy.qualities
        engine.gate.set()
        served = [event async for event in events]
        # The request is in flight until its events are closed.
        num_steps = engine.num_steps
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert engine.num_steps == num_steps
        assert start.service.policy.qualities == before
    assert isinstance(served[-1], FinishInfo)
    await until(lambda: not start.service.status().unmeasured)
    assert levels_of(start) == FOUND
    await start.service.close()


async def test_what_cannot_be_measured_is_told_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = SteepEngine()
    start = late_start(tmp_path, engine)
    await start.startup.run()
    engine.num_failing = 1
    await until(lambda: not start.service.status().unmeasured)
    (problem,) = start.service.status().level_problems
    assert problem.startswith("the quality of depth 8, 4 could not be measured: ")
    assert problem in caplog.text
    assert start.service.state is State.SERVING
    await start.service.close()


async def test_an_engine_that_dies_meanwhile_is_measured_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    start = late_start(tmp_path)
    engine = start.engine
    await start.startup.run()
    engine.gate.clear()
    steps = engine.num_steps
    await until(lambda: engine.num_steps > steps)
    engine.die()
    engine.gate.set()
    await until(lambda: not start.service.status().unmeasured)
    assert levels_of(start) == FOUND
    assert start.service.status().num_engine_restarts == 1
    await start.service.close()


async def test_levels_that_are_set_meanwhile_are_measured_instead(tmp_path: Path) -> None:
    start = late_start(tmp_path)
    await start.startup.run()
    with start.service.updating() as updates:
        specs = [LevelSpec("full", 8), LevelSpec("half", max_quality_loss=0.5)]
        policy = await updates.set_levels(specs)
    assert policy.level("half").depths == DepthPair(4, 4)
    await until(lambda: not start.service.status().unmeasured)
    assert levels_of(start) == {"full": (8, 8), "half": (4, 4)}
    await start.service.close()


async def test_repair_is_decided_before_levels_are_searched_for(tmp_path: Path) -> None:
    engine = RepairingEngine()
    start = Start(
        tmp_path,
        engine=engine,
        levels=DEFAULT_LEVELS,
        default_level="dense",
        repair="closed-form",
    )
    await start.startup.run()
    assert start.service.policy.repair == engine.installed is not None
    assert levels_of(start) == FOUND
    await start.service.close()


async def test_dedicated_engines_do_not_search(tmp_path: Path) -> None:
    settings = load_settings({"engine": "dedicated", "state_dir": str(tmp_path)})
    specs, default_level = chosen_levels(settings, 16)
    assert [(spec.name, spec.depth) for spec in specs] == [
        ("dense", 16),
        ("balanced", 12),
        ("fast", 8),
        ("turbo", 4),
    ]
    assert default_level == "dense"
    levels = '{"fast": {"max_quality_loss": 0.25}}'
    settings = load_settings({"engine": "dedicated", "levels": levels})
    with pytest.raises(
        InvalidArgument, match=r"^levels\.fast\.max_quality_loss: got 0\.25, allowed: a depth in"
    ):
        chosen_levels(settings, 16)
    levels_of_depths = tuple(map(spec_of, LEVELS[:2]))
    start = Start(tmp_path, engine=FixedDepths(), levels=levels_of_depths)
    await start.startup.run()
    with (
        pytest.raises(InvalidArgument, match=r"^levels\[0\]\.max_quality_loss: got 0\.25"),
        start.service.updating() as updates,
    ):
        await updates.set_levels([LevelSpec("fast", max_quality_loss=0.25)])
    await start.service.close()


def test_default_levels_that_are_named_are_not_optional() -> None:
    settings = load_settings({"default_level": "fast", "auto_levels": "fast,turbo"})
    specs, default_level = chosen_levels(settings, 16)
    assert default_level == "fast"
    assert [spec.name for spec in specs if spec.optional] == ["balanced", "prompt"]
