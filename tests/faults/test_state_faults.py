"""State directories that cannot be used: the server says so, and serves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.e2e.calls import assert_generates
from tests.e2e.running_server import measurements_in, running_server


@contextmanager
def disk(directory: Path, options: str) -> Iterator[Path]:
    """A disk of its own, mounted with these options."""
    mount = shutil.which("mount")
    directory.mkdir()
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"mode=755,{options}", "fathom-test", directory],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("a disk cannot be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@contextmanager
def full_disk(directory: Path) -> Iterator[Path]:
    """A disk of its own without a free byte."""
    with disk(directory, "size=64k"):
        (directory / "filler").write_bytes(bytes(64 * 1024))
        with pytest.raises(OSError, match="No space left"):
            (directory / "more").write_bytes(b"x")
        yield directory


def read_only_disk(directory: Path) -> AbstractContextManager[Path]:
    return disk(directory, "size=16m,ro")


@contextmanager
def no_directory(path: Path) -> Iterator[Path]:
    """A file where the directory should be: not even root can write below it."""
    path.write_text("in the way")
    yield path / "state"


@pytest.mark.parametrize(
    "trouble",
    [full_disk, read_only_disk, no_directory],
    ids=["full disk", "read-only disk", "no directory"],
)
def test_it_says_so_and_serves(
    trouble: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    with (
        trouble(tmp_path / "state") as state,
        running_server(
            tmp_path / "server", state_dir=state, quality_depths="levels", compile_layers=True
        ) as server,
    ):
        with server.client() as client:
            assert_generates(client)
        assert "Ranking the layers" in measurements_in(server.log)
        warnings = [
            line for line in server.log.splitlines() if " WARNING " in line and str(state) in line
        ]
        assert any("plan-" in line and "cannot be kept" in line for line in warnings), server.log
        first, warning = server.readiness()
        assert (first, warning.partition(" ")[0]) == ("ok", "warning:")
        assert warning.startswith(f"warning: state_dir: {state}") or "not a directory" in warning
        assert warning.removeprefix("warning: ") in server.log
        assert "Traceback" not in server.log


def test_a_disk_that_forbids_exec_keeps_all_but_compiled_code(tmp_path: Path) -> None:
    with (
        disk(tmp_path / "state", "size=64m,noexec") as state,
        running_server(
            tmp_path / "server", state_dir=state, quality_depths="levels", compile_layers=True
        ) as server,
    ):
        with server.client() as client:
            assert_generates(client)
        assert "its volume forbids exec" in server.log
        assert "compiled one layer for" in server.log
        assert server.readiness() == [
            "ok",
            f"warning: state_dir: {state} is on a volume that forbids exec, so no compiled code is "
            "kept in it",
        ]
        assert list(state.glob("plan-*.json"))
        assert not list((state / "compiled").iterdir())
        assert "Traceback" not in server.log
