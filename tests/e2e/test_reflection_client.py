"""A client in another language, made from nothing but what server reflection tells."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.rpc.client import Client
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer

SOURCE = Path(__file__).parent / "reflection_client"
NUM_TOKENS = 16
DEPTHS = (16, 12, 8)


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script with the packages that it needs."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is absent")
    directory = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(SOURCE, directory)
    options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    result = run(["npm", "install", *options], directory)
    if result.returncode != 0:
        pytest.skip(f"npm cannot install the packages of the client: {result.stderr[-300:]}")
    return directory


def test_a_node_client_generates_at_three_depths(
    node_client: Path, demo_server: RunningServer, demo_client: Client
) -> None:
    depths = [str(depth) for depth in DEPTHS]
    command = ["node", "script.mjs", demo_server.address, "The list of", str(NUM_TOKENS), *depths]
    result = run(command, node_client)
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    assert {"fathom.v1.Inference", "fathom.v1.Control", "grpc.health.v1.Health"} <= set(
        told["services"]
    )
    assert told["num_layers"] == demo_client.get_model().num_layers
    for depth, generation in zip(DEPTHS, told["generations"], strict=True):
        response = demo_client.generate(greedy_request("The list of", NUM_TOKENS, depth=depth))
        assert generation["token_ids"] == list(response.token_ids)
        assert generation["text"] == response.text
        assert generation["streamed_token_ids"] == list(response.token_ids)
        served = {
            "prefill_layers": depth,
            "decode_layers": depth,
            "reason": "REASON_REQUESTED",
            "stand_in": "STAND_IN_NONE",
        }
        assert generation["served"] == served
        first, *deltas, last = generation["events"]
        assert (first, {*deltas}, last) == ("prompt_info", {"delta"}, "finish_info")
