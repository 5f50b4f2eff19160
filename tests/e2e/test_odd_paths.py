"""Names that shells and libraries trip over, and directories of libraries that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

from server.model.source import DEMO_MODEL
from tests.e2e.calls import assert_generates
from tests.e2e.running_server import running_server

# Spaces, quotes, letters outside of ASCII, a line's end, and what shells take for their own.
ODD = "a b'c\"d \u00e9 \u6a21 $x\n-;&"


def test_it_serves_from_odd_paths_without_the_directories_of_libraries(tmp_path: Path) -> None:
    directory = tmp_path / ODD
    model = shutil.copytree(DEMO_MODEL, directory / "model", ignore=shutil.ignore_patterns("*.py*"))
    (file := tmp_path / "file").touch()
    nowhere = {name: str(file) for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")}
    nowhere |= {"HOME": "/nonexistent/home", "TMPDIR": "/nonexistent/tmp"}
    with (
        running_server(directory, variables=nowhere, model=model) as server,
        server.client() as client,
    ):
        assert_generates(client)
        assert client.get_model().name == str(model)
    assert "Traceback" not in server.log
