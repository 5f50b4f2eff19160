"""The state directory, against other users of the machine."""

from __future__ import annotations

import logging
import os
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from server.access.state_protection import protect_state
from server.errors import InvalidArgument

# On Linux, a user that owns nothing.
NOBODY = 65534


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(directory: Path) -> str:
    with pytest.raises(InvalidArgument) as caught:
        protect_state(directory)
    assert (caught.value.field, caught.value.value) == ("state_dir", str(directory))
    return str(caught.value)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory as a server leaves it."""
    directory = tmp_path / "state dir"
    (directory / "compiled" / "ab").mkdir(parents=True)
    (directory / "compiled" / "ab" / "layer.so").write_bytes(b"code")
    directory.chmod(0o755)
    return directory


def test_one_that_is_missing_is_left_to_those_that_write_to_it(tmp_path: Path) -> None:
    protect_state(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_compiled_code_is_closed_to_others(state: Path) -> None:
    protect_state(state)
    assert mode_of(state / "compiled") == 0o700
    assert mode_of(state) == 0o755
    protect_state(state)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_others_may_not_write_to_it(state: Path, mode: int) -> None:
    state.chmod(mode)
    assert f"other users can write to {state} (mode {mode:04o})" in refusal(state)


@pytest.mark.parametrize("name", ["compiled", "compiled/ab", "compiled/ab/layer.so"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_others_may_not_write_to_compiled_code(state: Path, name: str, mode: int) -> None:
    (state / name).chmod(mode)
    assert f"other users can write to {state / name} (mode {mode:04o})" in refusal(state)


@pytest.mark.parametrize("name", [".", "compiled", "compiled/ab/layer.so"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_others_may_not_own_it(state: Path, name: str) -> None:
    os.chown(state / name, NOBODY, -1)
    assert f"{state / name} belongs to user nobody" in refusal(state)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_another_user_is_refused(state: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(state)
    protect_state(link)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert f"{link} belongs to user nobody" in refusal(link)


def test_a_link_leads_to_what_is_checked(state: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(state)
    state.chmod(0o777)
    assert f"other users can write to {link} (mode 0777)" in refusal(link)


def test_what_the_error_says_to_run_helps(state: Path) -> None:
    (state / "compiled").chmod(0o777)
    command = refusal(state).rpartition(": ")[2].partition(", which")[0]
    assert command == f"rm -rf {shlex.quote(str(state / 'compiled'))}"
    subprocess.run(command, shell=True, check=True)
    protect_state(state)
    state.chmod(0o777)
    remove, _, change = refusal(state).rpartition("then ")[2].partition(" and ")
    for command in (remove, change):
        subprocess.run(command, shell=True, check=True)
    protect_state(state)


@pytest.mark.parametrize(("mode", "warns"), [(0o777, True), (0o1777, False), (0o755, False)])
def test_a_parent_that_others_may_write_to_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    parent = tmp_path / "volume"
    parent.mkdir()
    parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        protect_state(parent / "state")
    assert (f"other users can write to {parent} (mode 0777)" in caplog.text) is warns


def blocked(directory: Path) -> Path:
    (directory / "file").write_text("in the way")
    return directory / "file" / "state"


@pytest.mark.parametrize("of", [blocked, lambda directory: blocked(directory).parent])
def test_one_that_cannot_be_is_left_to_those_that_use_it(
    tmp_path: Path, of: Callable[[Path], Path]
) -> None:
    protect_state(of(tmp_path))
