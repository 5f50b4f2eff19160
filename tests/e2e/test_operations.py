"""A server as operators run it: TLS, tokens, JSON logs, traces, and settings that change."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.rpc.client import CallError, Client
from server.rpc.client_tls import ClientTls
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, until
from tests.server.access.authority import Authority
from tests.server.telemetry.collector import Collector, collecting, plain

ALICE, OPS, BOB = "token-of-alice-000", "token-of-ops-000000", "token-of-bob-000000"
SECRET = "The secret of a client"


class GuardedServer(RunningServer):
    """Takes TLS and a token."""

    tls: ClientTls
    token: str | None = None

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.address, timeout=timeout, tls=self.tls, token=self.token)

    def lines(self) -> list[dict[str, Any]]:
        """Return the log; every line of it must be a JSON object."""
        return [json.loads(line) for line in self.log.splitlines()]

    def wait_for(self, message: str, times: int = 1) -> None:
        def found() -> bool:
            return sum(message in line["message"] for line in self.lines()) == times

        until(found, lambda: self.log)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operations")


@pytest.fixture(scope="module")
def server(
    demo_server: RunningServer, collector: Collector, directory: Path
) -> Iterator[GuardedServer]:
    authority = Authority()
    certificate, key = authority.issue("server").write(directory, "server")
    clients = directory / "clients"
    clients.touch(mode=0o600)
    clients.write_text(f"alice inference {ALICE}\nops inference,control {OPS}\n")
    (directory / "fathom.yaml").write_text("levels: {full: 16, half: 8}\n")
    GuardedServer.tls = ClientTls(ca=authority.pem)
    # A copy, because measurements of new levels are kept, which other tests would notice.
    state = demo_server.copy_state(directory)
    server = GuardedServer(
        directory,
        state_dir=state,
        config=directory / "fathom.yaml",
        levels=None,
        tls_certificate=certificate,
        tls_key=key,
        clients=clients,
        log_format="json",
        log_level="debug",
        otlp_endpoint=collector.endpoint,
    )
    try:
        server.wait_until_serving()
        server.token = OPS
        yield server
    finally:
        server.close()


def test_a_life_with_everything_on(
    server: GuardedServer, collector: Collector, directory: Path
) -> None:
    server.token = ALICE
    with server.client() as client:
        assert client.generate(greedy_request(SECRET, 5)).text
        with pytest.raises(CallError, match="PERMISSION_DENIED"):
            client.get_status()

    # Levels change at once; what is broken changes nothing.
    (directory / "fathom.yaml").write_text("levels: {full: 16, third: 6}\nmax_context: 256\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("settings read again; changed: levels")
    server.wait_for("take a restart to change: max_context")
    (directory / "fathom.yaml").write_text("levels: {full: 17}\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("levels.full.depth: got 17, allowed: 1 to 16")
    assert server.readiness() == ["ok", "warning: levels.full.depth: got 17, allowed: 1 to 16"]
    with server.client() as client:
        assert [level.name for level in client.get_model().levels] == ["full", "third"]

    # Files are read again without a signal; one that goes is missed, and stays in force.
    (directory / "clients").unlink()
    server.wait_for("what was read before stays in force")
    assert any(
        f"warning: clients: got '{directory}/clients'" in line for line in server.readiness()
    )
    (directory / "clients").write_text(f"bob inference {BOB}\n")
    server.wait_for("have been read again", times=2)  # once on the first signal
    with server.client() as client, pytest.raises(CallError, match="UNAUTHENTICATED"):
        client.get_model()
    server.token = BOB
    with server.client() as client:
        assert client.generate(greedy_request(SECRET, 5, depth=6)).served.decode_layers == 6
        assert client.health() == "SERVING"

    assert server.stop() == 0
    spans = collector.wait_for(4)
    generated = [plain(s.attributes) for s in spans if s.name.startswith("text_completion ")]
    assert [each["gen_ai.usage.output_tokens"] for each in generated] == [5, 5]
    assert [each["enduser.id"] for each in generated] == ["alice", "bob"]
    assert [each["fathom.decode_layers"] for each in generated] == [16, 6]

    lines = server.lines()
    requests = [line for line in lines if line["logger"] == "server.requests"]
    assert [
        (line["client"], line["method"].partition("/")[2], line["code"]) for line in requests
    ] == [
        ("alice", "Generate", "OK"),
        ("alice", "GetStatus", "PERMISSION_DENIED"),
        ("alice", "GetModel", "OK"),
        ("127.0.0.1", "GetModel", "UNAUTHENTICATED"),
        ("bob", "Generate", "OK"),
    ]
    assert requests[0]["generated_tokens"] == 5
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    for secret in (SECRET, ALICE, OPS, BOB):
        assert secret not in server.log
        assert secret.encode() not in collector.raw
