"""The real server in a real container, as a rendered manifest says."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from server.rpc.client import CallError, Client
from tests.deploy.containers import Container, Podman, running_container
from tests.deploy.pods import Pods, pods_of
from tests.deploy.rendering import overlay
from tests.e2e.calls import assert_generates, greedy_request
from tests.e2e.running_server import PATIENCE, Scrape

OVERLAY = "cpu-demo"


@pytest.fixture(scope="module")
def pods() -> Pods:
    (pods,) = pods_of(overlay(OVERLAY))
    return pods


@pytest.fixture(scope="module")
def container(pods: Pods, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    directory = tmp_path_factory.mktemp("container")
    podman = Podman(directory)
    image = podman.build_runtime(directory)
    with running_container(podman, image, pods, overlay(OVERLAY), directory) as container:
        yield container


def client(container: Container) -> Client:
    return Client(f"127.0.0.1:{container.port(50051)}", timeout=PATIENCE)


def probe(container: Container, spec: Any) -> bool:
    """Do what kubelet does for a probe; return whether it succeeds."""
    address = f"127.0.0.1:{container.port(spec['grpc']['port'])}"
    try:
        with Client(address, timeout=spec["timeoutSeconds"]) as asking:
            return asking.health(spec["grpc"]["service"]) == "SERVING"
    except CallError:
        return False


def wait_for_probe(container: Container, spec: Any) -> None:
    """Ask as often as kubelet would, and give up when it would."""
    for _ in range(spec["failureThreshold"]):
        assert container.is_running, container.log
        if probe(container, spec):
            return
        time.sleep(spec["periodSeconds"])
    pytest.fail(container.log)


@pytest.mark.timeout(1200)
def test_a_life(container: Container, pods: Pods) -> None:
    """One test, for each of its steps takes the ones before."""
    (spec,) = pods.spec["containers"]

    # It is alive before it is ready, and ready within the time that the manifest gives it.
    wait_for_probe(container, spec["livenessProbe"])
    wait_for_probe(container, spec["startupProbe"])
    assert probe(container, spec["readinessProbe"])

    # Hardened as it is, it serves, compiles, measures and is read.
    with client(container) as calling:
        assert_generates(calling)
        assert calling.generate(greedy_request("The list", 8, depth=8)).text
    assert "cannot keep compiled code" not in container.log
    assert "Traceback" not in container.log, container.log
    with urllib.request.urlopen(f"http://127.0.0.1:{container.port(9090)}/metrics") as answer:
        scrape = Scrape(answer.read().decode())
    assert scrape.value("fathom_engine_up") == 1
    assert scrape.sum("fathom_generation_tokens_total", depth="8") == 8
    assert container.execute("id", "-u").strip() == "10001"
    assert container.execute("fathom", "health").strip() == "SERVING"
    with pytest.raises(AssertionError, match="Read-only file system"):
        container.execute("touch", "/opt/written")

    # A stream that runs when it is told to stop goes on to its end.
    first = threading.Event()
    texts: list[str] = []

    def stream() -> None:
        with client(container) as calling:
            for message in calling.generate_stream(greedy_request("The list", 300)):
                if message.WhichOneof("event") == "delta":
                    texts.append(message.delta.text)
                    first.set()
                elif message.WhichOneof("event") == "finish_info":
                    texts.append("finished")

    streaming = threading.Thread(target=stream)
    streaming.start()
    assert first.wait(PATIENCE), container.log
    container.signal("TERM")
    streaming.join(PATIENCE)
    assert texts[-1] == "finished"
    assert container.wait() == 0, container.log
