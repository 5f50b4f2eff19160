"""Plan and measurements of a model, kept between starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pruning.plan import Plan
from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from server.calibration.policy_store import PlanFile, PolicyStore
from server.depth.levels import DepthPair, Level
from server.depth.measured import Measured, Speed
from server.depth.policy import DepthPolicy
from server.state import StateDirectory

FINGERPRINT = "sha256:model"
PLAN = Plan(
    removal_order=(2, 1, 3, 0),
    scores=(0.4, 0.2, 0.1, 0.3),
    stderrs=(0.01, 0.01, 0.01, 0.01),
    model_fingerprint=FINGERPRINT,
    text_fingerprint="sha256:text",
    num_tokens=64,
    versions={"torch": "2"},
    created_at=1.0,
)
POLICY = DepthPolicy(PLAN, (Level("dense", 4, 4), Level("fast", 2, 2)))
DENSE, FAST, MIXED = DepthPair(4, 4), DepthPair(2, 2), DepthPair(2, 4)


def store(directory: Path, fingerprint: str = FINGERPRINT, num_layers: int = 4) -> PolicyStore:
    return PolicyStore(
        StateDirectory(directory),
        PlanFile(fingerprint, num_layers),
        repair_key={"model": "sha256:model"},
        plan_key={"model": "m"},
        quality_key={"model": "m"},
        probes_key={"model": "m"},
        speed_key={"model": "m", "hardware": "h"},
    )


class Measuring:
    """Makes measurements that tell depths apart, and remembers which were asked for."""

    def __init__(self) -> None:
        self.asked: list[list[DepthPair]] = []

    async def plan(self) -> Plan:
        self.asked.append([])
        return PLAN

    async def qualities(self, depths: Sequence[DepthPair]) -> Mapping[DepthPair, Quality]:
        self.asked.append(list(depths))
        return {pair: quality(pair) for pair in depths}

    async def probes(self, depths: Sequence[DepthPair]) -> Mapping[DepthPair, Probes]:
        self.asked.append(list(depths))
        return {pair: probes(pair) for pair in depths}

    async def speeds(self, depths: Sequence[DepthPair]) -> Mapping[DepthPair, Speed]:
        self.asked.append(list(depths))
        return {pair: speed(pair) for pair in depths}


def quality(pair: DepthPair) -> Quality:
    return Quality(10 + pair.prefill_layers / 3, 0.1, 1 / pair.decode_layers, 0.5, 64)


def probes(pair: DepthPair) -> Probes:
    """Return probes with a share that tells depths apart."""
    share = 1 / pair.decode_layers
    if pair == MIXED:
        return Probes(None, None)
    ratio = math.inf if pair == FAST else 1.5
    return Probes(
        Writing(3.0, 2.0, ratio, 0.25, share, 0.1, 0.3, 16, 768),
        Choosing(0.75, 0.05, share, 0.06, 64, 0.25),
    )


def speed(pair: DepthPair) -> Speed:
    return Speed(100 / pair.decode_layers, 4 / pair.decode_layers, 8)


async def test_plan_is_made_once(tmp_path: Path) -> None:
    measuring = Measuring()
    assert await store(tmp_path).plan(measuring.plan) == PLAN
    assert await store(tmp_path).plan(measuring.plan) == PLAN
    assert measuring.asked == [[]]


async def test_kept_plan_is_a_plan_file(tmp_path: Path) -> None:
    await store(tmp_path).plan(Measuring().plan)
    (path,) = tmp_path.glob("plan-*.json")
    assert Plan.load(path) == PLAN


async def test_plan_of_another_model_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = replace(PLAN, model_fingerprint="sha256:other")
    (state := StateDirectory(tmp_path)).save(
        "plan", {"model": "m"}, PlanFile("sha256:other", 4), foreign
    )
    assert state.path_of("plan", {"model": "m"}).exists()
    assert await store(tmp_path).plan(Measuring().plan) == PLAN
    assert "model_fingerprint" in caplog.text


async def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    measuring = Measuring()
    first = await store(tmp_path).qualities(POLICY, [DENSE, FAST], measuring.qualities)
    second = await store(tmp_path).qualities(POLICY, [DENSE, FAST, MIXED], measuring.qualities)
    assert measuring.asked == [[DENSE, FAST], [MIXED]]
    assert first == {pair: quality(pair) for pair in (DENSE, FAST)}
    assert second == {pair: quality(pair) for pair in (DENSE, FAST, MIXED)}


async def test_probes_are_kept_as_they_are(tmp_path: Path) -> None:
    measuring = Measuring()
    expected = {pair: probes(pair) for pair in (DENSE, FAST, MIXED)}
    assert await store(tmp_path).probes(POLICY, list(expected), measuring.probes) == expected
    assert await store(tmp_path).probes(POLICY, list(expected), measuring.probes) == expected
    assert measuring.asked == [list(expected)]


async def test_probes_without_a_dense_model_are_made_again_where_there_is_one(
    tmp_path: Path,
) -> None:
    measuring = Measuring()
    alone = Probes(
        Writing(None, None, None, None, 0.25, None, None, 16, 768),
        Choosing(0.75, 0.05, None, None, 64, 0.25),
    )

    async def without_dense(depths: Sequence[DepthPair]) -> Mapping[DepthPair, Probes]:
        return dict.fromkeys(depths, alone)

    no_dense = DepthPolicy(PLAN, POLICY.levels[1:], any_depth=False)
    assert await store(tmp_path).probes(no_dense, [FAST], without_dense) == {FAST: alone}
    assert await store(tmp_path).probes(no_dense, [FAST], measuring.probes) == {FAST: alone}
    assert measuring.asked == []
    for _ in range(2):
        found = await store(tmp_path).probes(POLICY, [FAST], measuring.probes)
        assert found == {FAST: probes(FAST)}
    assert measuring.asked == [[FAST]]


async def test_measurements_belong_to_layers_and_not_to_depths(tmp_path: Path) -> None:
    """Another plan leaves out other layers at the same depth, except at full depth."""
    measuring = Measuring()
    await store(tmp_path).speeds(POLICY, [DENSE, FAST], measuring.speeds)
    other = POLICY.with_plan(replace(PLAN, removal_order=(3, 0, 1, 2)))
    await store(tmp_path).speeds(other, [DENSE, FAST], measuring.speeds)
    assert measuring.asked == [[DENSE, FAST], [FAST]]
    await store(tmp_path).speeds(POLICY, [DENSE, FAST], measuring.speeds)
    assert len(measuring.asked) == 2


async def test_policy_measured_while_serving_is_what_the_next_start_gets(tmp_path: Path) -> None:
    recalibrated = POLICY.with_plan(replace(PLAN, removal_order=(3, 0, 1, 2))).with_measured(
        Measured({FAST: quality(FAST)}, {FAST: speed(FAST)}, {FAST: probes(FAST)})
    )
    store(tmp_path).save(recalibrated)
    measuring = Measuring()
    again = store(tmp_path)
    assert await again.plan(measuring.plan) == recalibrated.plan
    assert await again.qualities(recalibrated, [FAST], measuring.qualities) == {FAST: quality(FAST)}
    assert await again.speeds(recalibrated, [FAST], measuring.speeds) == {FAST: speed(FAST)}
    assert await again.probes(recalibrated, [FAST], measuring.probes) == {FAST: probes(FAST)}
    assert measuring.asked == []
