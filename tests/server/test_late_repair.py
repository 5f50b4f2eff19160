"""Repair that is fitted while the server serves, which is the default."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.calibration import late_measurements
from server.depth.levels import LevelSpec
from server.depth.repair import StandIn
from tests.server.calibration.repairing_engine import RepairingEngine
from tests.server.rpc.toy_engine import ToyEngine
from tests.server.test_startup import Start, levels_of, until

LEVELS = (LevelSpec("dense", 0.0), LevelSpec("fast", max_quality_loss=0.25))


def start_of(directory: Path, engine: ToyEngine, text: str = "calibration text " * 20) -> Start:
    return Start(directory, text, engine, 0.01, LEVELS, "dense", startup_seconds="3600")


@pytest.fixture(autouse=True)
def short_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_measurements, "_CALM_SECONDS", 0.02)
    monkeypatch.setattr(late_measurements, "_POLL_SECONDS", 0.01)


async def test_it_comes_into_force_while_serving_and_is_there_at_the_next_start(
    tmp_path: Path,
) -> None:
    engine = RepairingEngine()
    engine.fit_gate.clear()
    start = start_of(tmp_path, engine)
    await start.startup.run()
    status = start.service.status()
    assert (status.repair.wanted, status.repair.in_force) == (StandIn.CLOSED_FORM, None)
    assert (status.repair.problem, status.unmeasured) == ("", ("repair", "probes of dense, fast"))
    policy = start.service.policy
    assert policy.repair is None

    engine.fit_gate.set()
    seen = []
    while start.service.status().unmeasured:
        seen.append(levels_of(start))
        await until(lambda: levels_of(start) != seen[-1] or not start.service.status().unmeasured)
    repaired = start.service.policy
    assert repaired.repair == engine.installed is not None
    assert all("fast" in levels for levels in seen), "no level is away meanwhile"
    assert {level.depths for level in repaired.levels} <= (
        repaired.qualities.keys() & repaired.speeds.keys() & repaired.probes.keys()
    )
    assert start.service.repair.in_force is not None
    await start.service.close()

    again = RepairingEngine()
    second = start_of(tmp_path, again)
    await second.startup.run()
    assert (again.num_fits, second.service.status().unmeasured) == (0, ())
    assert second.service.policy == repaired
    await second.service.close()


async def test_an_engine_that_dies_in_a_fit_is_repaired_when_it_is_back(tmp_path: Path) -> None:
    engine = RepairingEngine()
    engine.fit_gate.clear()
    start = start_of(tmp_path, engine)
    await start.startup.run()
    engine.die()
    await until(lambda: start.service.status().num_engine_restarts)
    engine.fit_gate.set()
    await until(lambda: start.service.policy.repair)
    await until(lambda: not start.service.status().unmeasured)
    await start.service.close()


async def test_maps_that_cannot_be_fitted_are_told_of_and_the_server_serves(
    tmp_path: Path,
) -> None:
    start = start_of(tmp_path, RepairingEngine(), "short")
    await start.startup.run()
    await until(lambda: not start.service.status().unmeasured)
    status = start.service.status()
    assert status.repair.in_force is None
    assert status.repair.problem.startswith(
        "repair is not used: its maps could not be fitted: text: got 6 tokens to fit repair on, "
    )
    await start.service.close()


async def test_an_engine_that_cannot_repair_has_none(tmp_path: Path) -> None:
    start = start_of(tmp_path, ToyEngine())
    await start.startup.run()
    status = start.service.status()
    probes = "probes of dense, fast"
    assert (status.repair.wanted, status.unmeasured) == (StandIn.NONE, (probes,))
    await start.service.close()


async def test_a_start_without_end_fits_it(tmp_path: Path) -> None:
    engine = RepairingEngine()
    start = Start(tmp_path, engine=engine, startup_seconds="inf")
    await start.startup.run()
    assert start.service.policy.repair == engine.installed is not None
    assert start.service.status().unmeasured == ()
    await start.service.close()


async def test_a_start_without_end_goes_on_without_maps_that_cannot_be_fitted(
    tmp_path: Path,
) -> None:
    start = Start(tmp_path, "short", RepairingEngine(), startup_seconds="inf")
    await start.startup.run()
    status = start.service.status()
    assert status.repair.in_force is None
    assert status.repair.problem.startswith("repair is not used: text: got 6 tokens to fit")
    assert status.unmeasured == ()
    await start.service.close()
