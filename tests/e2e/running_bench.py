"""``fathom bench`` in a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.report import Report
from tests.e2e.running_server import PATIENCE
from tests.fathom_command import FATHOM, environment


def bench(directory: Path, *arguments: str) -> tuple[Report, str]:
    result = subprocess.run(
        [FATHOM, "bench", *arguments, "--output", "out", "--work-dir", "work"],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    name = arguments[0]
    files = {path.name for path in (directory / "out").iterdir()}
    assert files == {f"{name}.json", f"{name}.png", f"{name}.svg"}
    return Report.model_validate_json((directory / "out" / f"{name}.json").read_text()), (
        result.stdout
    )
