"""One server for the commands that talk to one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.cli.served import Server, start_server


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="package")
def server(stories_model: Path, directory: Path) -> Iterator[Server]:
    started = start_server(stories_model, directory)
    try:
        started.wait_until_serving()
        yield started
    finally:
        started.kill()
