"""Volumes that a state directory cannot use, or not fully."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.access.state_volume import StateVolume, state_volume_problem


@pytest.fixture
def volume(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A volume of its own, mounted with the options of an indirect parameter."""
    directory, mount = tmp_path / "volume", shutil.which("mount")
    directory.mkdir()
    command = [
        str(mount),
        "-t",
        "tmpfs",
        "-o",
        f"mode=700,{request.param}",
        "fathom",
        str(directory),
    ]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a volume cannot be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    ("volume", "problems"),
    [
        ("size=16m", []),
        ("size=16m,ro", ["read-only volume"]),
        ("size=64k", ["full volume (65536 bytes are free)"]),
        ("size=16m,noexec", ["forbids exec"]),
        ("size=64k,noexec", ["full volume (65536 bytes are free)", "forbids exec"]),
    ],
    indirect=["volume"],
)
def test_what_is_wrong_with_a_volume(volume: Path, problems: list[str]) -> None:
    for directory in (volume, volume / "not" / "there"):
        found = state_volume_problem(directory)
        assert bool(found) == bool(problems)
        assert all(problem in found for problem in problems)
        assert found.startswith(f"state_dir: {directory} is on a " if problems else "")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert state_volume_problem(file / "state") == (
        f"state_dir: {file} is not a directory, so nothing is kept for the next start"
    )


@pytest.mark.parametrize("volume", ["size=8m"], indirect=True)
def test_it_is_told_once_and_when_it_is_over(
    volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    state = StateVolume(volume)
    state.look()
    assert (state.problem, caplog.messages) == ("", [])
    (volume / "filler").write_bytes(bytes(6 << 20))
    state.look()
    state.look()
    assert caplog.messages == [state.problem]
    assert "full volume" in state.problem
    (volume / "filler").unlink()
    state.look()
    assert caplog.messages[1:] == [f"state_dir: {volume} can be used again"]
    assert state.problem == ""
