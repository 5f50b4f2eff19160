"""The file of the settings, watched."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.config import Settings, load_settings
from server.reload import SettingsFile

LOOK_SECONDS = 0.01


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "fathom.yaml"
    path.write_text("grace_seconds: 1\n")
    return path


@pytest.fixture
def file(path: Path) -> SettingsFile:
    def read() -> Settings:
        return load_settings({"config": str(path)})

    return SettingsFile(path, read)


async def test_a_change_is_told_once_it_has_been_written(path: Path, file: SettingsFile) -> None:
    changed = asyncio.Event()
    following = asyncio.create_task(file.follow(changed, LOOK_SECONDS))
    path.write_text("grace_seconds: 22\n")
    await changed.wait()
    changed.clear()
    assert file.read().grace_seconds == 22
    # As kubelet changes a ConfigMap: another directory behind the same link.
    other = path.parent / "other"
    other.mkdir()
    (other / "fathom.yaml").write_text("grace_seconds: 333\n")
    (path.parent / "link").symlink_to(other / "fathom.yaml")
    (path.parent / "link").replace(path)
    await changed.wait()
    assert file.read().grace_seconds == 333
    following.cancel()


async def test_what_has_been_read_is_no_change(path: Path, file: SettingsFile) -> None:
    """On SIGHUP the settings are read at once."""
    changed = asyncio.Event()
    path.write_text("grace_seconds: 22\n")
    assert file.read().grace_seconds == 22
    following = asyncio.create_task(file.follow(changed, LOOK_SECONDS))
    for _ in range(10):
        await asyncio.sleep(LOOK_SECONDS)
    assert not changed.is_set()
    following.cancel()
