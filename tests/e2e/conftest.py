"""Servers that the tests of this folder share: a start costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.rpc.client import Client
from tests.e2e.running_server import RunningServer, running_server
from tests.fathom_command import free_ports


@pytest.fixture(scope="package")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Serves the demo model with compiled layers, and a state directory that was empty."""
    (http_port,) = free_ports(1)
    directory = tmp_path_factory.mktemp("demo")
    with running_server(directory, compile_layers=True, http_port=http_port) as server:
        yield server
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def stories_server(
    stories_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("stories"), model=stories_model) as server:
        yield server
    assert "Traceback" not in server.log, server.log


@pytest.fixture
def demo_client(demo_server: RunningServer) -> Iterator[Client]:
    with demo_server.client() as client:
        yield client


@pytest.fixture
def stories_client(stories_server: RunningServer) -> Iterator[Client]:
    with stories_server.client() as client:
        yield client
