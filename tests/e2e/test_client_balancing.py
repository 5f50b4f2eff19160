"""Two replicas of one state directory, and a client that balances its calls by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import grpc
import pytest

# Client-side health checks need the messages of the health service.
from grpc_health.v1 import health_pb2 as health_pb2

from server.rpc.generated.fathom.v1 import inference_pb2_grpc
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, measurements_in, until

SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "fathom.v1.Inference"},
}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    directory = tmp_path_factory.mktemp("replicas")
    servers: list[RunningServer] = []
    try:
        for number in range(2):
            servers.append(
                RunningServer(
                    directory / str(number),
                    state_dir=directory / "state",
                    levels="dense=16,fast=8",
                    drain_delay_seconds=2,
                )
            )
            # One after the other, so that the second finds what the first has measured.
            servers[-1].wait_until_serving()
        yield servers
    finally:
        for server in servers:
            server.close()


def test_the_second_replica_measures_nothing_again(replicas: list[RunningServer]) -> None:
    assert measurements_in(replicas[0].log)
    assert measurements_in(replicas[1].log) == []


def test_a_replica_that_drains_gets_no_more_calls_and_none_fails(
    replicas: list[RunningServer],
) -> None:
    target = "ipv4:" + ",".join(server.address for server in replicas)
    options = [("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    request = greedy_request("The list", 8, depth=8)
    failures: list[grpc.RpcError] = []
    stop = threading.Event()

    with grpc.insecure_channel(target, options) as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)

        def call() -> bool:
            return len(inference.Generate(request, timeout=PATIENCE).token_ids) == 8

        def call_on() -> None:
            while not stop.is_set():
                try:
                    assert call()
                except grpc.RpcError as error:
                    failures.append(error)

        def answered(server: RunningServer) -> float:
            return server.scrape().sum("fathom_requests_total", code="OK", depth="8")

        until(
            lambda: call() and all(answered(server) for server in replicas),
            lambda: "one of the replicas gets no calls",
        )
        callers = [threading.Thread(target=call_on) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            assert replicas[0].stop() == 0, replicas[0].log
            before = answered(replicas[1])
            until(
                lambda: answered(replicas[1]) >= before + 10,
                lambda: "the replica that is left gets no calls",
            )
        finally:
            stop.set()
            for caller in callers:
                caller.join(PATIENCE)
    assert failures == []
