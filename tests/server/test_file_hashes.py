"""Hashes of files are computed once, and anew for every change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pruning.fingerprint import file_sha256
from server import file_hashes
from server.file_hashes import FileHashes


@pytest.fixture(autouse=True)
def every_file_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files, and such that have been written just now."""
    monkeypatch.setattr(file_hashes, "_MIN_BYTES", 0)
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", -1.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights ü"
    path.write_bytes(b"content")
    return path


def never(path: Path) -> str:
    raise AssertionError(f"{path} is read once more")


def test_a_file_is_read_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = file_sha256(file)
    state = tmp_path / "state"
    assert FileHashes(state)(file) == expected
    link = tmp_path / "link"
    link.symlink_to(file)
    monkeypatch.setattr(file_hashes, "file_sha256", never)
    assert FileHashes(state)(file) == expected
    assert FileHashes(state)(link) == expected
    assert len(list(state.iterdir())) == 1


def _in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"C")


def _replaced(path: Path) -> None:
    """By a file of the same size and the same time of modification."""
    status = path.stat()
    new = path.with_name("new")
    new.write_bytes(b"CONTENT")
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)


def _in_place_with_its_time_kept(path: Path) -> None:
    status = path.stat()
    _in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [_in_place, _replaced, _in_place_with_its_time_kept])
def test_every_change_is_seen(file: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    hashes = FileHashes(tmp_path / "state")
    before = hashes(file)
    change(file)
    assert hashes(file) == file_sha256(file) != before
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_what_was_changed_just_now_is_not_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", 1e6)
    assert FileHashes(tmp_path / "state")(file) == file_sha256(file)
    assert not (tmp_path / "state").exists()


def test_small_files_are_read_every_time(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "_MIN_BYTES", 8)
    assert FileHashes(tmp_path / "state")(file) == file_sha256(file)
    assert not (tmp_path / "state").exists()


def test_a_damaged_entry_is_not_trusted(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    expected = FileHashes(state)(file)
    (entry,) = state.iterdir()
    entry.write_text(entry.read_text().replace(expected, "0" * 64))
    assert FileHashes(state)(file) == expected
    assert "is not used and will be made anew" in caplog.text


def test_without_a_place_for_them_files_are_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no directory")
    assert FileHashes(tmp_path / "state")(file) == file_sha256(file)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileHashes(tmp_path)(tmp_path / "absent")
