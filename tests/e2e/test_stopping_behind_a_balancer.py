"""Settings that change in their file, and a stop that balancers have time to notice."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from server.rpc.client import CallError
from tests.e2e.calls import assert_generates
from tests.e2e.running_server import PATIENCE, RunningServer, running_server, until

# Longer than the calls take that must come in it, on a busy machine as well.
DRAIN_DELAY = 20


def probe(server: RunningServer, path: str) -> tuple[int, str]:
    url = server.metrics_url.replace("/metrics", path)
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.timeout(900)
def test_settings_change_and_calls_are_taken_while_health_says_no(
    demo_server: RunningServer, tmp_path: Path
) -> None:
    config = tmp_path / "fathom.yaml"
    config.write_text(f"levels: {{full: 16, half: 8}}\ndrain_delay_seconds: {DRAIN_DELAY}\n")
    state = demo_server.copy_state(tmp_path)
    settings: dict[str, Any] = {"state_dir": state, "levels": None}
    with (
        running_server(tmp_path, config=config, **settings) as server,
        server.client() as client,
    ):
        config.write_text(config.read_text().replace("half: 8", "third: 5"))
        until(lambda: "settings read again; changed: levels" in server.log, lambda: server.log)
        assert [level.name for level in client.get_model().levels] == ["full", "third"]
        assert probe(server, "/readyz") == (200, "ok\n")

        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.health("fathom.v1.Inference") == "NOT_SERVING", lambda: server.log)
        assert client.health("fathom.v1.Control") == "SERVING"
        assert probe(server, "/livez") == (200, "ok\n")
        assert probe(server, "/readyz") == (503, "the server is being stopped\n")
        assert_generates(client)
        assert server.process.wait(PATIENCE) == 0, server.log
        with pytest.raises(CallError, match="UNAVAILABLE"):
            client.health()


def test_the_counters_of_depth(demo_server: RunningServer) -> None:
    """Mean depth is a rate over a rate, which a label's value could not give."""
    before = demo_server.scrape()
    with demo_server.client() as client:
        assert_generates(client)
    after = demo_server.scrape()

    def more(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    tokens = more("fathom_generation_tokens_total")
    assert tokens == 3
    assert more("fathom_generation_layers_total") == 16 * tokens
    assert more("fathom_requests_served_total", reason="default") == 1
    assert more("fathom_requests_served_total", reason="degraded") == 0
