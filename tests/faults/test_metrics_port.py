"""The metrics port is taken by another program."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.e2e.calls import assert_generates
from tests.e2e.running_server import running_server, until


def test_it_says_so_serves_and_waits_for_the_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_server(tmp_path, metrics_port=port, quality_depths="levels") as server:
            (report,) = [line for line in server.log.splitlines() if " ERROR " in line]
            assert f"metrics_port: got {port}, allowed: a port that is free on 127.0.0.1" in report
            assert "no metrics, their port is taken" in server.log
            with server.client() as client:
                assert_generates(client)
            taken.close()
            until(lambda: "metrics_port is free now" in server.log, lambda: server.log)
            assert server.scrape().value("fathom_engine_up") == 1
