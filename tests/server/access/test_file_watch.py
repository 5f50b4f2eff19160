"""Files that change, all at once or one after the other."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from server.access.file_watch import FileWatch
from server.errors import FathomError


@pytest.fixture
def changes() -> list[str]:
    return []


def watch(changes: list[str], *paths: Path) -> FileWatch:
    return FileWatch(lambda: paths, lambda: changes.append("change"))


def test_a_change_counts_once_it_rests(tmp_path: Path, changes: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("1")
    watched = watch(changes, one, two)
    watched.look()
    assert changes == []
    one.write_text("22")
    watched.look()
    two.write_text("22")
    watched.look()
    assert changes == []
    watched.look()
    watched.look()
    assert changes == ["change"]


def test_files_come_and_go(tmp_path: Path, changes: list[str]) -> None:
    path = tmp_path / "file"
    watched = watch(changes, path)
    for touch in (path.touch, path.unlink):
        touch()
        watched.look()
        watched.look()
    assert changes == ["change", "change"]


def test_links_are_followed(tmp_path: Path, changes: list[str]) -> None:
    """As a Kubernetes volume is replaced: a link to a directory is."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("same")
    data = tmp_path / "data"
    data.symlink_to("old")
    watched = watch(changes, data / "file")
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").replace(data)
    watched.look()
    watched.look()
    assert changes == ["change"]


def test_what_has_been_read_is_no_change(tmp_path: Path, changes: list[str]) -> None:
    path = tmp_path / "file"
    watched = watch(changes, path)
    path.touch()
    assert watched.read_now()
    watched.look()
    watched.look()
    assert changes == ["change"]


def test_what_is_wrong_is_read_until_it_is_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a certificate that becomes valid while its file stays the same."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "file"
    path.touch()
    problems: list[str] = []
    num_reads = 0

    def read() -> None:
        nonlocal num_reads
        num_reads += 1
        if problems:
            raise FathomError(problems.pop(0))

    watched = FileWatch(lambda: [path], read, "the files")
    path.write_text("new")
    problems += ["not valid yet", "not valid yet", "gone"]
    for _ in range(6):
        watched.look()
    assert num_reads == 4
    kept = "what was read before stays in force, and the file is tried again"
    assert caplog.messages == [
        f"not valid yet; {kept}",
        f"gone; {kept}",
        "the files have been read again",
    ]
