"""Probes and the page on the port of the metrics."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from server.telemetry import http_pages
from server.telemetry.http_pages import Probes
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_server import MetricsServer


@pytest.fixture
async def probes() -> Probes:
    return Probes()


@pytest.fixture
async def server(probes: Probes) -> AsyncIterator[MetricsServer]:
    server = MetricsServer(Metrics(), "127.0.0.1", 0, probes)
    yield server
    await asyncio.to_thread(server.close)


def get(server: MetricsServer, path: str) -> tuple[int, str]:
    """Return the status and the body, whatever the status is."""
    url = f"http://127.0.0.1:{server.port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_a_server_is_alive_before_it_is_ready(server: MetricsServer, probes: Probes) -> None:
    assert await asyncio.to_thread(get, server, "/livez") == (200, "ok\n")
    assert await asyncio.to_thread(get, server, "/readyz") == (503, "the server is starting\n")
    probes.not_ready = lambda: ""
    assert await asyncio.to_thread(get, server, "/readyz") == (200, "ok\n")
    probes.not_ready = lambda: "the server is not serving: engine down"
    assert await asyncio.to_thread(get, server, "/readyz") == (
        503,
        "the server is not serving: engine down\n",
    )


async def test_what_is_wrong_comes_below(server: MetricsServer, probes: Probes) -> None:
    probes.warnings = lambda: ["levels: got 99,\n allowed: 1 to 8", "state_dir: full"]
    wrong = "warning: levels: got 99, allowed: 1 to 8\nwarning: state_dir: full\n"
    answer = await asyncio.to_thread(get, server, "/readyz")
    assert answer == (503, f"the server is starting\n{wrong}")
    probes.not_ready = lambda: ""
    assert await asyncio.to_thread(get, server, "/readyz") == (200, f"ok\n{wrong}")
    assert await asyncio.to_thread(get, server, "/livez") == (200, "ok\n")


def test_a_server_whose_loop_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pages, "_LOOP_SECONDS", 0.1)
    loop = asyncio.new_event_loop()
    hangs, may_end = threading.Event(), threading.Event()

    async def make() -> Probes:
        return Probes()

    def hang() -> None:
        hangs.set()
        may_end.wait()

    probes = loop.run_until_complete(make())
    loop.call_soon(hang)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        hangs.wait()
        assert probes.not_alive_problem() == "the server has not answered for 0.1 s"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        may_end.set()
        thread.join()
        loop.close()
    assert probes.not_alive_problem() == "the server has ended"


async def test_the_page_takes_nothing_from_elsewhere(server: MetricsServer) -> None:
    def page() -> tuple[str, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=30) as response:
            return response.headers["Content-Security-Policy"], response.read().decode()

    policy, text = await asyncio.to_thread(page)
    assert "default-src 'none'" in policy
    assert "<title>Fathom</title>" in text
    assert "src=" not in text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


async def test_metrics_stay_where_they_were(server: MetricsServer) -> None:
    status, text = await asyncio.to_thread(get, server, "/metrics")
    assert status == 200
    assert "fathom_engine_up" in text
