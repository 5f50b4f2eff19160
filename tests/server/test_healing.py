"""Healed maps and gated MLPs at a start and while serving, with a toy engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from pruning.repair import (
    GatedMlps,
    Healing,
    HealingStep,
    LayerMap,
    RepairError,
    RepairMaps,
    load_stand_ins,
    maps_fingerprint,
    save_gated_mlps,
    save_maps,
    summarize_maps,
)
from pruning.repair.healing_job import HealingJob
from server.calibration.healed_store import HealedStore
from server.calibration.healing import what_is_not_better, what_is_worse
from server.depth.levels import DepthPair, LevelSpec
from server.depth.policy import DepthPolicy
from server.engine.base import EngineDead, LayerSelection, ProgressCallback
from server.startup import Startup
from tests.gated_mlps import random_mlps
from tests.server.calibration.repairing_engine import RepairingEngine
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine
from tests.server.test_startup import Start

FAST, GENERATIVE, OTHER = DepthPair(4, 4), DepthPair(4, 8), DepthPair(5, 5)


class HealingEngine(RepairingEngine):
    """A toy that keeps several files of stand-ins.

    Of what closed-form maps lose, healed ones leave ``healed``, gated MLPs ``gated``.
    """

    def __init__(self, healed: float = 0.5, gated: float = 0.5) -> None:
        super().__init__()
        self.healed, self.gated = healed, gated
        self.paths: dict[str, Path] = {}
        self.num_deaths = 0

    def has_repair(self, fingerprint: str) -> bool:
        return fingerprint in self.paths

    async def install_repair(self, path: Path) -> str:
        fingerprint = maps_fingerprint(path)
        load_stand_ins(path)
        self.paths[fingerprint] = path
        return fingerprint

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        if self.num_deaths and any(self._is_healed(layers) for layers in selections):
            self.num_deaths -= 1
            raise EngineDead("killed")
        qualities = await super().measure_quality(windows, selections, progress)
        return [
            replace(
                quality,
                kl_nats=(quality.kl_nats or 0.0) * left,
                perplexity=quality.perplexity * (left + 1) / 2,
            )
            for left, quality in zip(map(self._left, selections), qualities, strict=True)
        ]

    def _left(self, layers: LayerSelection) -> float:
        if not self._is_healed(layers):
            return 1.0
        kind = summarize_maps(self.paths[str(layers.repair)]).healing_kind
        return self.gated if kind == "gated-mlp" else self.healed

    def _is_healed(self, layers: LayerSelection) -> bool:
        return (
            layers.repair is not None
            and load_stand_ins(self.paths[layers.repair]).healing is not None
        )


def gated_mlps(skipped: tuple[int, ...]) -> GatedMlps:
    return random_mlps(skipped, num_layers=NUM_LAYERS, hidden_size=4, model="sha256:model")


def healed_maps(skipped: tuple[int, ...]) -> RepairMaps:
    return RepairMaps(
        {layer: LayerMap(torch.eye(4) * 0.1, 1.0, 0.5) for layer in skipped},
        num_layers=NUM_LAYERS,
        model_fingerprint="sha256:model",
        text_fingerprint="sha256:t",
        num_tokens=100,
        healing=Healing(skipped, None, 60, 60, 0, 0.5, 0.25),
    )


class Started:
    """A server that has started with healed maps."""

    def __init__(self, directory: Path, engine: ToyEngine, **settings: Any) -> None:
        self.start = Start(directory, engine=engine, repair="healed", **settings)
        self.service = self.start.service
        self.store = HealedStore(directory, "sha256:model", NUM_LAYERS)

    @property
    def startup(self) -> Startup:
        return self.start.startup

    @property
    def policy(self) -> DepthPolicy:
        return self.service.policy

    async def run(self) -> DepthPolicy:
        await self.startup.run()
        return self.policy


async def skipped_by_the_plan(directory: Path) -> tuple[int, ...]:
    """Start once, so that everything is kept; return the layers that the level fast skips."""
    started = Started(directory, HealingEngine())
    policy = await started.run()
    await started.service.close()
    assert not policy.healed
    assert policy.selection(FAST).repair == policy.repair is not None
    return policy.selection(FAST).decode_skips


def quality(perplexity: float, kl: float | None) -> Quality:
    return Quality(perplexity, 0.1, 0.5, kl, 100)


def test_better_is_better_in_perplexity_and_divergence() -> None:
    before = quality(10.0, 0.5)
    assert what_is_not_better(before, quality(9.0, 0.4)) == ""
    assert what_is_not_better(before, quality(10.0, 0.4)) == "perplexity 10, before: 10"
    assert what_is_not_better(before, quality(9.0, 0.6)) == (
        "divergence from the dense model 0.6, before: 0.5"
    )
    not_measured = "divergence from the dense model was not measured"
    assert what_is_not_better(before, quality(9.0, None)) == not_measured
    assert what_is_not_better(quality(10.0, None), quality(9.0, 0.4)) == not_measured


def test_a_probe_counts_beyond_its_noise() -> None:
    before = probes(ratio=1.5, repeated=0.10, accuracy=0.60)
    assert what_is_worse(before, before) == ""
    assert what_is_worse(before, probes(ratio=1.7, repeated=0.14, accuracy=0.50)) == ""
    worse = what_is_worse(before, probes(ratio=1.9, repeated=0.20, accuracy=0.40))
    assert worse == (
        "written text has 1.9 times dense's perplexity, before: 1.5; repeats 20 % of what it "
        "writes, before: 10 %; chooses 40 % right, before: 60 %"
    )
    assert what_is_worse(before, Probes(None, None)) == ""
    assert what_is_worse(Probes(None, None), before) == ""


def probes(ratio: float, repeated: float, accuracy: float) -> Probes:
    return Probes(
        Writing(3 * ratio, 3.0, ratio, 0.1, repeated, 0.05, 0.2, 16, 768),
        Choosing(accuracy, 0.05, 0.8, 0.05, 64, 0.25),
    )


async def test_a_level_that_does_worse_by_its_probes_keeps_its_maps(
    tmp_path: Path,
    trained: list[HealingJob],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compared: list[tuple[Probes, Probes]] = []

    def worse(before: Probes, after: Probes) -> str:
        compared.append((before, after))
        return "chooses 20 % right, before: 40 %"

    monkeypatch.setattr("server.calibration.healing.what_is_worse", worse)
    started = Started(tmp_path, HealingEngine(), heal="true")
    policy = await started.run()
    assert started.startup.healer is not None
    await started.startup.healer.run()
    assert started.policy.healed == policy.healed == {}
    assert len(compared) == 2, "at both levels"
    assert all(isinstance(each, Probes) for pair in compared for each in pair)
    assert "are not used: chooses 20 % right, before: 40 % at depth 4" in caplog.text
    await started.service.close()


async def test_kept_maps_are_used_where_they_are_better(tmp_path: Path) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, engine := HealingEngine())
    path = started.store.path_of(skipped)
    save_maps(healed_maps(skipped), path)
    policy = await started.run()
    fingerprint = maps_fingerprint(path)
    assert policy.healed == {skipped: fingerprint}
    for pair in (FAST, GENERATIVE):
        assert policy.selection(pair).repair == fingerprint, pair
        assert policy.qualities[pair].kl_nats == pytest.approx(
            len(skipped) * (1 if pair == FAST else 0.5) / 100 * 0.5 * 0.5
        )
    assert policy.selection(OTHER).repair == policy.repair is not None
    assert policy.selection(policy.dense).repair is None
    assert engine.has_repair(fingerprint)
    await started.service.close()

    again = Started(tmp_path, engine := HealingEngine())
    assert await again.run() == policy
    assert engine.num_steps == 0
    await again.service.close()

    plain = Start(tmp_path, engine=HealingEngine(), repair="closed-form")
    await plain.startup.run()
    assert not plain.service.policy.healed
    await plain.service.close()


async def test_both_measurements_of_a_start_share_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, engine := HealingEngine(), startup_seconds="10")
    save_maps(healed_maps(skipped), started.store.path_of(skipped))
    # The budget is used up when the healed maps have been judged.
    clock = SimpleNamespace(monotonic=lambda: 20.0 if len(engine.paths) > 1 else 0.0)
    monkeypatch.setattr("server.startup.time", clock)
    policy = await started.run()
    assert policy.healed
    assert FAST in policy.qualities
    assert FAST not in policy.speeds
    assert any("speed of" in each for each in started.service.status().unmeasured)
    await started.service.close()


async def test_kept_maps_that_are_no_better_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, HealingEngine(healed=1.0))
    save_maps(healed_maps(skipped), started.store.path_of(skipped))
    policy = await started.run()
    assert not policy.healed
    assert policy.selection(FAST).repair == policy.repair
    assert "healed maps of 4 of 8 layers are not used: perplexity" in caplog.text
    assert "at depth 4; perplexity" in caplog.text, "at both levels"
    await started.service.close()


async def test_damaged_maps_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, HealingEngine())
    path = started.store.path_of(skipped)
    save_maps(healed_maps(skipped), path)
    path.write_bytes(path.read_bytes()[:-1])
    assert not (await started.run()).healed
    assert f"healed maps are not used: {path}: truncated" in caplog.text
    await started.service.close()


async def test_maps_that_the_engine_loses_are_used_no_longer(tmp_path: Path) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, engine := HealingEngine())
    path = started.store.path_of(skipped)
    save_maps(healed_maps(skipped), path)
    policy = await started.run()
    assert policy.healed
    del engine.paths[policy.healed[skipped]]
    engine.die()
    while started.service.status().num_engine_restarts == 0 or started.policy.healed:
        await asyncio.sleep(0.01)
    assert started.policy.selection(FAST).repair == policy.repair
    assert FAST not in started.policy.qualities, "that was measured with the healed maps"
    assert started.policy.qualities[OTHER] == policy.qualities[OTHER]
    await started.service.close()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[HealingJob]:
    """The trainings that were done, by a stand-in for the process that does them."""
    jobs: list[HealingJob] = []

    async def heal(job: HealingJob, on_step: object) -> None:
        jobs.append(job)
        assert callable(on_step)
        on_step(HealingStep(20, 60, 0.5, 0.4))
        if job.kind == "gated-mlp":
            save_gated_mlps(gated_mlps(tuple(job.skipped)), Path(job.out))
        else:
            save_maps(healed_maps(tuple(job.skipped)), Path(job.out))

    monkeypatch.setattr("server.serving.level_healer.heal_beside", heal)
    return jobs


async def test_levels_are_healed_after_the_start(
    tmp_path: Path, trained: list[HealingJob], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    started = Started(tmp_path, HealingEngine(), heal="true", heal_steps="60", heal_seed="3")
    policy = await started.run()
    assert not policy.healed
    assert started.startup.healer is not None
    await started.startup.healer.run()
    skipped = policy.selection(FAST).decode_skips
    [job] = trained
    assert (job.skipped, job.steps, job.seed, job.held_out) == (skipped, 60, 3, ())
    assert maps_fingerprint(Path(str(job.closed_form))) == policy.repair
    assert "healing for 4 of 8 layers: 20 of 60 steps, 0.400 nats from the dense" in caplog.text
    assert "healed maps of 4 of 8 layers are in force" in caplog.text
    fingerprint = maps_fingerprint(started.store.path_of(skipped))
    assert started.policy.healed == {skipped: fingerprint}
    for pair in (FAST, GENERATIVE):
        assert started.policy.selection(pair).repair == fingerprint
        assert pair in started.policy.qualities
        assert pair in started.policy.speeds
    assert [path.suffix for path in tmp_path.glob("healing-*")] == [".json"]
    await started.startup.healer.run()
    assert len(trained) == 1, "it was done before"
    after = started.policy
    await started.service.close()

    again = Started(
        tmp_path, engine := HealingEngine(), heal="true", heal_steps="60", heal_seed="3"
    )
    assert await again.run() == after
    assert engine.num_steps == 0
    assert again.startup.healer is not None
    await again.startup.healer.run()
    assert len(trained) == 1
    await again.service.close()


async def test_levels_get_gated_mlps_where_these_are_better_than_their_maps(
    tmp_path: Path, trained: list[HealingJob], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    skipped = await skipped_by_the_plan(tmp_path)
    settings = {"heal": "true", "heal_kind": "gated-mlp", "heal_intermediate_size": "8"}
    started = Started(tmp_path, HealingEngine(gated=0.4), **settings)
    maps = started.store.path_of(skipped)
    save_maps(healed_maps(skipped), maps)
    policy = await started.run()
    assert policy.healed == {skipped: maps_fingerprint(maps)}
    assert started.startup.healer is not None
    await started.startup.healer.run()
    [job] = trained
    assert (job.skipped, job.kind, job.intermediate_size) == (skipped, "gated-mlp", 8)
    assert maps_fingerprint(Path(str(job.closed_form))) == policy.repair
    assert "gated MLPs of 4 of 8 layers are in force" in caplog.text
    mlps = started.store.path_of(skipped, "gated-mlp")
    after = started.policy
    assert after.healed == {skipped: maps_fingerprint(mlps)}
    for pair in (FAST, GENERATIVE):
        assert after.selection(pair).repair == maps_fingerprint(mlps)
        kl = after.qualities[pair].kl_nats
        assert kl == pytest.approx(0.8 * (policy.qualities[pair].kl_nats or 0.0))
    await started.startup.healer.run()
    assert len(trained) == 1, "it was done before"
    assert "was done before: the gated MLPs are kept" in caplog.text
    await started.service.close()

    again = Started(tmp_path, engine := HealingEngine(gated=0.4))
    assert await again.run() == after
    assert engine.num_steps == 0
    await again.service.close()

    mlps.write_bytes(mlps.read_bytes()[:-1])
    third = Started(tmp_path, HealingEngine(gated=0.4))
    assert (await third.run()).healed == policy.healed, "the maps are left"
    assert f"gated MLPs are not used: {mlps}: truncated" in caplog.text
    await third.service.close()


async def test_kept_mlps_that_are_no_better_than_maps_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = await skipped_by_the_plan(tmp_path)
    started = Started(tmp_path, HealingEngine(gated=0.6))
    save_maps(healed_maps(skipped), maps := started.store.path_of(skipped))
    save_gated_mlps(gated_mlps(skipped), started.store.path_of(skipped, "gated-mlp"))
    assert (await started.run()).healed == {skipped: maps_fingerprint(maps)}
    assert "gated MLPs of 4 of 8 layers are not used: perplexity" in caplog.text
    await started.service.close()


async def test_what_is_no_better_is_not_put_in_force(
    tmp_path: Path, trained: list[HealingJob], caplog: pytest.LogCaptureFixture
) -> None:
    started = Started(tmp_path, HealingEngine(healed=1.0), heal="true")
    policy = await started.run()
    assert started.startup.healer is not None
    await started.startup.healer.run()
    assert started.policy == policy
    assert "healed maps of 4 of 8 layers are not used: perplexity" in caplog.text
    assert not list(tmp_path.glob("healed-*"))
    await started.startup.healer.run()
    assert len(trained) == 1, "it was tried before"
    await started.service.close()


async def test_an_engine_that_dies_while_it_measures(
    tmp_path: Path, trained: list[HealingJob], caplog: pytest.LogCaptureFixture
) -> None:
    started = Started(tmp_path, engine := HealingEngine(), heal="true")
    await started.run()
    assert started.startup.healer is not None
    engine.num_deaths = 1
    await started.startup.healer.run()
    assert started.policy.healed, "it was tried again"
    await started.service.close()


async def test_an_engine_that_dies_every_time(
    tmp_path: Path, trained: list[HealingJob], caplog: pytest.LogCaptureFixture
) -> None:
    started = Started(tmp_path, engine := HealingEngine(), heal="true")
    await started.run()
    assert started.startup.healer is not None
    engine.num_deaths = 99
    await started.startup.healer.run()
    assert not started.policy.healed
    assert "healing for 4 of 8 layers has failed: the engine has died" in caplog.text
    engine.num_deaths = 0
    await started.startup.healer.run()
    assert len(trained) == 1, "the maps need not be trained again"
    assert started.policy.healed
    await started.service.close()


async def test_a_training_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def heal(job: HealingJob, on_step: object) -> None:
        raise RepairError("memory ran out")

    monkeypatch.setattr("server.serving.level_healer.heal_beside", heal)
    started = Started(tmp_path, HealingEngine(), heal="true")
    policy = await started.run()
    assert started.startup.healer is not None
    await started.startup.healer.run()
    assert started.policy == policy
    assert "healing for 4 of 8 layers has failed: memory ran out" in caplog.text
    await started.service.close()


async def test_levels_that_have_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    started = Started(tmp_path, HealingEngine(), heal="true")
    policy = await started.run()
    assert started.startup.healer is not None
    [dense] = [level for level in policy.levels if level.name == "dense"]

    async def heal(job: HealingJob, on_step: object) -> None:
        save_maps(healed_maps(tuple(job.skipped)), Path(job.out))
        with started.service.updating() as updates:
            await updates.set_levels([LevelSpec("dense", dense.decode_layers)])

    monkeypatch.setattr("server.serving.level_healer.heal_beside", heal)
    await started.startup.healer.run()
    assert not started.policy.healed
    assert "are not used: no level skips these layers now" in caplog.text
    await started.service.close()
