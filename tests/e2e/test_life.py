"""The life of a server that shares its state directory with another: start, signal, end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from server.rpc.client import CallError
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from server.serving.result_check import MAX_CHECK_TOKENS
from tests.e2e.calls import LONG, Streamed, failure, greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, Scrape, measurements_in, until
from tests.e2e.watcher import Watcher
from tests.fathom_command import FATHOM, environment

HEALTH = ("", "fathom.v1.Inference")
NOT_SERVING, SERVING = "NOT_SERVING", "SERVING"
# A client that reads nothing holds the rest of its stream back in the server, however fast
# that is: the window does not grow, and log-probabilities make the messages large.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]


@dataclass(frozen=True)
class Life:
    """Observations of a server from its start to its end."""

    log: str
    refused_while_starting: CallError
    health_while_starting: subprocess.CompletedProcess[str]
    health_while_serving: subprocess.CompletedProcess[str]
    plan: common_pb2.Plan
    model: inference_pb2.Model
    scrape_at_start: Scrape
    refused_while_draining: CallError
    streamed: Streamed
    statuses: dict[str, list[str]]
    exit_code: int


@pytest.fixture(scope="module")
def life(demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    server = RunningServer(
        tmp_path_factory.mktemp("life"),
        state_dir=demo_server.state_directory,
        compile_layers=True,
    )
    try:
        with Watcher(server.address) as all_of_it, Watcher(server.address, HEALTH[1]) as inference:
            yield live(server, [all_of_it, inference])
    finally:
        server.close()


def live(server: RunningServer, watchers: list[Watcher]) -> Life:
    with server.client() as client:
        for watcher in watchers:
            watcher.wait_for(NOT_SERVING)
        refused_while_starting = failure(lambda: client.generate(greedy_request("The list", 3)))
        health_while_starting = ask_for_health(server)
        server.wait_until_serving()
        health_while_serving = ask_for_health(server)
        scrape_at_start = server.scrape()
        plan, model = client.get_plan().plan, client.get_model()

        with grpc.insecure_channel(server.address, options=SMALL_WINDOW) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            request = greedy_request("The list", LONG, depth=model.num_layers // 2)
            request.output.logprobs = 20
            stream = stub.GenerateStream(request)
            messages = [next(stream), next(stream)]
            server.process.terminate()
            for watcher in watchers:
                watcher.wait_for(NOT_SERVING, SERVING, NOT_SERVING)
            refused_while_draining = failure(lambda: client.generate(greedy_request("The list", 3)))
            messages.extend(stream)
        exit_code = server.process.wait(PATIENCE)
    return Life(
        log=server.log,
        refused_while_starting=refused_while_starting,
        health_while_starting=health_while_starting,
        health_while_serving=health_while_serving,
        plan=plan,
        model=model,
        scrape_at_start=scrape_at_start,
        refused_while_draining=refused_while_draining,
        streamed=Streamed.of(messages),
        statuses={name: w.statuses for name, w in zip(HEALTH, watchers, strict=True)},
        exit_code=exit_code,
    )


def ask_for_health(server: RunningServer) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FATHOM, "health", "--address", server.address],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )


def test_health_follows_the_life(life: Life) -> None:
    expected = [NOT_SERVING, SERVING, NOT_SERVING]
    assert life.statuses == dict.fromkeys(HEALTH, expected)
    assert (life.health_while_starting.returncode, life.health_while_starting.stdout) == (
        1,
        "NOT_SERVING\n",
    )
    assert (life.health_while_serving.returncode, life.health_while_serving.stdout) == (
        0,
        "SERVING\n",
    )


def test_a_server_that_starts_refuses_requests_and_says_when_to_come_back(life: Life) -> None:
    assert life.refused_while_starting.code == "UNAVAILABLE"
    assert life.refused_while_starting.message.startswith("the server is starting: ")
    assert life.refused_while_starting.retry_after == 1.0


def test_a_second_start_measures_nothing_again(life: Life, demo_server: RunningServer) -> None:
    everything = ["Ranking the layers", "Measuring quality", "Measuring speed"]
    assert measurements_in(demo_server.log) == everything
    assert measurements_in(life.log) == []
    # When it begins to serve, no token has been through the engine but those that show whether
    # each of the four levels gives finite results.
    assert life.scrape_at_start.value("vllm:prompt_tokens_total") <= 4 * MAX_CHECK_TOKENS
    assert set(life.scrape_at_start.by_label("fathom_startup_seconds", "phase")) == {
        "inputs",
        "engine",
        "plan",
        "quality",
        "probes",
        "speed",
    }
    with demo_server.client() as client:
        assert life.plan == client.get_plan().plan
        assert life.model == client.get_model()
    depths = {str(depth) for depth in range(1, life.model.num_layers + 1)}
    assert set(life.scrape_at_start.by_label("fathom_depth_perplexity", "depth")) == depths


def test_what_runs_at_sigterm_is_finished_and_nothing_more_is_taken(life: Life) -> None:
    assert life.refused_while_draining.code == "UNAVAILABLE"
    assert life.refused_while_draining.message == (
        "the server is draining and takes no more requests"
    )
    assert len(life.streamed.token_ids) == LONG
    assert life.streamed.finish_info.usage.num_generated_tokens == LONG
    assert life.exit_code == 0


def test_a_life_without_trouble_logs_none(life: Life) -> None:
    assert "Traceback" not in life.log
    assert not [line for line in life.log.splitlines() if " WARNING " in line or " ERROR " in line]


def test_a_server_that_is_stopped_while_it_loads_leaves_no_process(tmp_path: Path) -> None:
    server = RunningServer(tmp_path)
    try:
        until(server.engine_processes, lambda: f"no engine:\n{server.log}")
        children = server.children()
        assert server.stop() == 0
        assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
        assert "Traceback" not in server.log
    finally:
        server.close()
