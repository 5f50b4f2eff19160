"""A server that heals its level while it serves, and has what was trained at its next start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pruning.plan import Plan
from pruning.repair import GatedMlps, load_maps, load_stand_ins
from server.engine.base import LayerSelection
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.conftest import data_path
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import RunningServer, flags, running_server, until
from tests.fathom_command import fathom_in_process
from tests.server.engine.elastic import reference

PROMPT = "Once upon a time, there was a little"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("healing")
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    (directory / "train.json").write_text(json.dumps(stories[:60]))
    (directory / "judge.json").write_text(json.dumps(stories[500:520]))
    return directory


def settings(directory: Path, stories_model: Path) -> dict[str, object]:
    return {
        "model": stories_model,
        "levels": "dense=5,fast=3",
        "repair": "healed",
        "heal_steps": 40,
        "variables": {"FATHOM_HEAL": "true"},
        "calibration": directory / "train.json",
        "quality_text": directory / "judge.json",
        "calibration_tokens": 8192,
    }


@pytest.fixture(scope="module")
def server(directory: Path, stories_model: Path) -> Iterator[RunningServer]:
    with running_server(directory / "first", **settings(directory, stories_model)) as server:
        yield server


def tokens(server: RunningServer, depth: int = 3) -> list[int]:
    with server.client() as client:
        return list(client.generate(greedy_request(PROMPT, NUM_TOKENS, depth=depth)).token_ids)


def plan_file(server: RunningServer) -> Path:
    (plan,) = server.state_directory.glob("plan-*.json")
    return plan


def expected(server: RunningServer, stories_model: Path, kept: Path, depth: int = 3) -> list[int]:
    """Return what transformers generates with these maps or gated MLPs."""
    skipped = tuple(sorted(Plan.load(plan_file(server)).skipped(depth)))
    with server.client() as client:
        prompt = list(client.tokenize(inference_pb2.TokenizeRequest(text=PROMPT)).ids)
    with torch.inference_mode():
        return reference.generate_with_skips(
            reference.load(stories_model),
            prompt,
            NUM_TOKENS,
            LayerSelection(skipped, skipped),
            load_stand_ins(kept).layers,
        )


def healed_file(server: RunningServer) -> Path:
    (path,) = server.state_directory.glob("healed-*.safetensors")
    return path


def test_a_level_is_healed_while_the_server_serves(
    server: RunningServer, stories_model: Path
) -> None:
    (closed_form,) = server.state_directory.glob("repair-*.safetensors")
    until(
        lambda: "healed maps of 3 of 5 layers are" in server.log,
        lambda: f"not healed:\n{server.log}",
    )
    assert "healed maps of 3 of 5 layers are in force" in server.log
    losses = re.findall(r"healing for 3 of 5 layers: .* ([\d.]+) nats from the dense", server.log)
    assert float(losses[-1]) < float(losses[0])
    maps = load_maps(healed_file(server))
    assert maps.healing is not None
    assert tokens(server) == expected(server, stories_model, healed_file(server))
    assert load_maps(closed_form).healing is None


def test_an_engine_that_is_killed_serves_the_healed_level_again(server: RunningServer) -> None:
    before = tokens(server)
    (engine,) = server.engine_processes()
    engine.kill()
    until(
        lambda: len(processes := server.engine_processes()) == 1 and processes[0] != engine,
        lambda: f"no new engine:\n{server.log}",
    )
    server.wait_until_serving()
    assert tokens(server) == before


def test_the_next_start_has_the_maps_and_mlps_that_were_trained_meanwhile(
    server: RunningServer, directory: Path, stories_model: Path, tmp_path: Path
) -> None:
    before = tokens(server)
    state = server.copy_state(tmp_path)
    changed = {
        **settings(directory, stories_model),
        "state_dir": state,
        "levels": "dense=5,fast=3,near=4",
        "plan": plan_file(server),
    }
    mlps = gated_mlps(changed)
    with running_server(tmp_path / "second", **changed) as again:
        assert f"healed maps of 3 of 5 layers: {state}" in again.log
        assert f"gated MLPs of 4 of 5 layers: {mlps}" in again.log
        assert tokens(again, depth=4) == expected(server, stories_model, mlps, depth=4)
        assert tokens(again) == before
        until(
            lambda: "healing for 3 of 5 layers was done before: the healed maps are" in again.log,
            lambda: f"not done before:\n{again.log}",
        )


def gated_mlps(changed: dict[str, object]) -> Path:
    """Train MLPs for the level near by ``fathom heal``; return the file that keeps them.

    They have further to go than maps, so they are given more stories.
    """
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    more = Path(str(changed["calibration"])).with_name("more.json")
    more.write_text(json.dumps(stories[:250]))
    options = {name: changed[name] for name in ("model", "quality_text", "plan", "state_dir")}
    options |= {
        "calibration": more,
        "calibration_tokens": 60_000,
        "dtype": "float32",
        "depth": 4,
        "kind": "gated-mlp",
        "intermediate_size": 128,
        "steps": 160,
    }
    result = fathom_in_process("heal", *flags(options))
    assert result.returncode == 0, result.stderr
    (path,) = (
        path
        for path in Path(str(changed["state_dir"])).glob("healed-*.safetensors")
        if isinstance(load_stand_ins(path), GatedMlps)
    )
    return path
