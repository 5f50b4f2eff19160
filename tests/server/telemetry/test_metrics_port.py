"""A port of the metrics that another program has."""

from __future__ import annotations

import asyncio
import logging
import socket
import urllib.request

import pytest

from server.errors import InvalidArgument
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_port import MetricsPort


async def test_it_listens_as_soon_as_it_can(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        port = MetricsPort(Metrics(), "127.0.0.1", number)
        assert port.url is None
        (report,) = caplog.records
        assert report.levelno == logging.ERROR
        assert report.getMessage().startswith(
            f"metrics_port: got {number}, allowed: a port that is free on 127.0.0.1 "
            "(Address already in use); serving without metrics"
        )
        num_attempts = 0
        listen = port._listen

        def counted() -> None:
            nonlocal num_attempts
            num_attempts += 1
            listen()

        monkeypatch.setattr(port, "_listen", counted)
        following = asyncio.create_task(port.follow(seconds=0.01))
        while num_attempts < 3:
            await asyncio.sleep(0.01)
        assert not following.done()
        assert port.url is None
    await following
    url = f"http://127.0.0.1:{number}/metrics"
    with urllib.request.urlopen(url) as response:
        assert b"fathom_engine_up" in response.read()
    assert [record.getMessage() for record in caplog.records[1:]] == [
        f"metrics_port is free now; metrics on {url}"
    ]
    port.close()


async def test_a_free_port_is_not_waited_for() -> None:
    port = MetricsPort(Metrics(), "127.0.0.1", 0)
    await port.follow(seconds=1000)
    assert port.url is not None
    port.close()


def test_a_server_that_never_got_it_can_be_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        MetricsPort(Metrics(), "127.0.0.1", taken.getsockname()[1]).close()


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="metrics_host: got "):
        MetricsPort(Metrics(), "192.0.2.1", 0)
