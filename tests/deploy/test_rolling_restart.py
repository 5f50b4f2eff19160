"""A rolling restart of two servers behind a real Envoy, with calls and streams all the while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.rpc.client import CallError, Client
from tests.deploy.envoy import CHECK_SECONDS, running_envoy
from tests.e2e.calls import Streamed, greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, until

# Longer than Envoy takes to notice, on a machine that is busy as well.
DRAIN_DELAY = 8 * CHECK_SECONDS
CALLERS = 2
NUM_TOKENS = 24


class Callers:
    """Threads that call and stream through an address, one request after the other."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.num_calls = 0
        self.num_streams = 0
        self.failures: list[CallError] = []
        self._threads = [
            threading.Thread(target=self._run, args=(streams,))
            for streams in (False, True)
            for _ in range(CALLERS)
        ]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        wanted = self.num_ended + count
        until(lambda: self.num_ended >= wanted, lambda: f"{self.num_ended} of {wanted} requests")

    @property
    def num_ended(self) -> int:
        with self._lock:
            return self.num_calls + self.num_streams + len(self.failures)

    def _run(self, streams: bool) -> None:
        request = greedy_request("The list", NUM_TOKENS, depth=8)
        with Client(self._address, timeout=PATIENCE) as client:
            while not self._stop.is_set():
                try:
                    if streams:
                        streamed = Streamed.of(client.generate_stream(request))
                        assert len(streamed.token_ids) == NUM_TOKENS
                    else:
                        assert len(client.generate(request).token_ids) == NUM_TOKENS
                except CallError as error:
                    with self._lock:
                        self.failures.append(error)
                else:
                    with self._lock:
                        self.num_calls += not streams
                        self.num_streams += streams


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[RunningServer]]:
    servers: list[RunningServer] = []
    try:
        for number in range(2):
            servers.append(started(tmp_path / str(number), tmp_path / "state"))
            # One after the other, so that the second finds what the first has measured.
            servers[-1].wait_until_serving()
        yield servers
    finally:
        for server in servers:
            server.close()


def started(directory: Path, state: Path, port: int | None = None) -> RunningServer:
    settings: dict[str, Any] = {} if port is None else {"port": port}
    return RunningServer(
        directory,
        state_dir=state,
        drain_delay_seconds=DRAIN_DELAY,
        compile_layers=False,
        quality_depths="levels",
        **settings,
    )


def gets_calls(server: RunningServer) -> Callable[[], bool]:
    return lambda: server.scrape().sum("fathom_requests_total", code="OK", depth="8") > 0


@pytest.mark.timeout(1200)
def test_nothing_fails(replicas: list[RunningServer], tmp_path: Path) -> None:
    ports = [server.port for server in replicas]
    with running_envoy(tmp_path, ports) as address:

        def serves() -> bool:
            try:
                with Client(address, timeout=5.0) as client:
                    return client.health("fathom.v1.Inference") == "SERVING"
            except CallError:
                return False

        until(serves, lambda: (tmp_path / "envoy.log").read_text())
        with Callers(address) as callers:
            callers.wait_for_more(20)
            for number, port in enumerate(ports):
                assert replicas[number].stop() == 0, replicas[number].log
                replicas[number] = started(tmp_path / f"{number}-again", tmp_path / "state", port)
                callers.wait_for_more(20)
                replicas[number].wait_until_serving()
                # Envoy has to notice before the other one goes.
                until(gets_calls(replicas[number]), lambda: "the new server gets no calls")
            callers.wait_for_more(20)
    assert callers.failures == []
    print(f"{callers.num_calls} calls and {callers.num_streams} streams, none failed")
