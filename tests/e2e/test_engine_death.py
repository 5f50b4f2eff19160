"""The engine's process is killed, and a damaged plan is found at the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pruning.plan import Plan
from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.e2e.calls import LONG, at_once, failure, greedy_request, requested
from tests.e2e.running_server import PATIENCE, RunningServer, measurements_in, running_server
from tests.e2e.watcher import Watcher
from tests.fathom_command import free_ports

DEPTHS = (16, 11, 6, 1)


@pytest.fixture(scope="module")
def damaged_plan(demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of a plan file, in a copy of another server's state directory."""
    state = demo_server.copy_state(tmp_path_factory.mktemp("damaged"))
    (path,) = state.glob("plan-*.json")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.fixture(scope="module")
def server(damaged_plan: Path) -> Iterator[RunningServer]:
    (http_port,) = free_ports(1)
    with running_server(damaged_plan.parents[1], http_port=http_port) as server:
        yield server


def test_a_damaged_plan_is_reported_and_made_anew(
    server: RunningServer, damaged_plan: Path
) -> None:
    reports = [line for line in server.log.splitlines() if str(damaged_plan) in line]
    assert len(reports) == 1
    assert " WARNING " in reports[0]
    assert "is not used and will be made anew" in reports[0]
    assert measurements_in(server.log)[0] == "Ranking the layers"
    with server.client() as client:
        in_force = client.get_plan().plan
    rebuilt = Plan.load(damaged_plan)
    assert list(rebuilt.removal_order) == list(in_force.removal_order)
    assert rebuilt.created_at == in_force.created_at


def test_a_killed_engine_is_started_again_and_answers_the_same(server: RunningServer) -> None:
    def answers(client: Client) -> list[list[int]]:
        return [
            list(client.generate(greedy_request("The list", 24, depth=depth)).token_ids)
            for depth in DEPTHS
        ]

    with server.client() as client, Watcher(server.address) as watcher:
        watcher.wait_for("SERVING")
        before = answers(client)
        assert server.scrape().value("fathom_engine_restarts_total") == 0
        (engine,) = server.engine_processes()

        def begin(depth: int) -> Iterator[inference_pb2.GenerateStreamResponse]:
            stream = client.generate_stream(greedy_request("The list", LONG, depth=depth))
            assert next(stream).prompt_info.served == requested(depth, depth)
            assert next(stream).delta.token_ids
            return stream

        streams = at_once(begin, DEPTHS)
        engine.kill()
        errors: list[CallError] = at_once(lambda stream: failure(lambda: list(stream)), streams)
        assert {error.code for error in errors} == {"UNAVAILABLE"}
        assert {error.message for error in errors} == {
            "the engine has died; it is being started again"
        }
        assert all(error.retry_after for error in errors)
        refused = failure(lambda: client.generate(greedy_request("The list", 3)))
        assert refused.code == "UNAVAILABLE"

        watcher.wait_for("SERVING", "NOT_SERVING", "SERVING")
        assert answers(client) == before
        assert client.get_status().num_engine_restarts == 1
    scrape = server.scrape()
    assert scrape.value("fathom_engine_restarts_total") == 1
    assert scrape.value("fathom_engine_up") == 1
    assert scrape.value("fathom_requests_running") == 0
    assert scrape.value("vllm:num_requests_running") == 0
    assert scrape.sum("vllm:generation_tokens_total") >= 24 * len(DEPTHS)
    (again,) = server.engine_processes()
    assert again.pid != engine.pid


def test_http_refuses_while_there_is_no_engine_and_then_answers_the_same(
    server: RunningServer,
) -> None:
    body = {"prompt": "The list", "max_tokens": 24, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "The list"}], "max_tokens": 4}
    base = f"http://127.0.0.1:{server.http_port}"
    with (
        httpx.Client(base_url=base, timeout=PATIENCE) as http,
        Watcher(server.address) as watcher,
    ):
        watcher.wait_for("SERVING")
        before = http.post("/v1/completions", json=body)
        assert before.status_code == 200
        (engine,) = server.engine_processes()
        engine.kill()
        watcher.wait_for("SERVING", "NOT_SERVING")
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/health").status_code == 503
        watcher.wait_for("SERVING", "NOT_SERVING", "SERVING")
        again = http.post("/v1/completions", json=body)
        assert again.status_code == 200
        assert again.json()["choices"] == before.json()["choices"]
        # The renderer has not died with the engine.
        assert http.post("/v1/chat/completions", json=chat).status_code == 200


def test_no_engine_outlives_the_process_that_it_was_forked_from(server: RunningServer) -> None:
    with server.client() as client, Watcher(server.address) as watcher:
        watcher.wait_for("SERVING")
        before = list(client.generate(greedy_request("The list", 24)).token_ids)
        (engine,) = server.engine_processes()
        parent = engine.parent()
        assert parent is not None
        assert parent.pid != server.process.pid
        stream = client.generate_stream(greedy_request("The list", LONG))
        next(stream)
        parent.kill()
        assert psutil.wait_procs([engine], timeout=PATIENCE)[1] == []
        error = failure(lambda: list(stream))
        assert (error.code, error.retry_after is None) == ("UNAVAILABLE", False)
        watcher.wait_for("SERVING", "NOT_SERVING", "SERVING")
        assert list(client.generate(greedy_request("The list", 24)).token_ids) == before


def test_it_still_ends_in_order(server: RunningServer) -> None:
    children = server.children()
    assert children
    assert server.stop() == 0
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
