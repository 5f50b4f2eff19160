"""Files that change, all at once or one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.access.file_watch import FileWatch


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


def test_what_is_known_is_no_change(tmp_path: Path, changes: list[str]) -> None:
    path = tmp_path / "file"
    watched = watch(changes, path)
    path.touch()
    watched.forget()
    watched.look()
    watched.look()
    assert changes == []
