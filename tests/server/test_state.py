"""The state directory: what is kept, what is not trusted, and several servers at once."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from server.state import JsonEntry, StateDirectory

KEY: dict[str, object] = {"model": "sha256:1", "num_tokens": 64}
Numbers = dict[str, float]


def entry(key: Mapping[str, object] = KEY) -> JsonEntry[Numbers]:
    return JsonEntry(Numbers, key)


def never(reason: str = "made although it was kept") -> Callable[[], Awaitable[Numbers]]:
    async def make() -> Numbers:
        raise AssertionError(reason)

    return make


def maker(value: Numbers) -> Callable[[], Awaitable[Numbers]]:
    async def make() -> Numbers:
        return value

    return make


async def test_kept_entry_is_not_made_again(tmp_path: Path) -> None:
    value = {"a": 0.1, "b": 1 / 3, "c": math.inf}
    state = StateDirectory(tmp_path / "new" / "state")
    assert await state.load_or_make("quality", KEY, entry(), maker(value)) == value
    again = StateDirectory(tmp_path / "new" / "state")
    assert await again.load_or_make("quality", KEY, entry(), never()) == value


async def test_a_new_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        StateDirectory(tmp_path / "saved").save("quality", KEY, entry(), {})
        async with StateDirectory(tmp_path / "locked").locked("quality", KEY):
            pass
    finally:
        os.umask(before)
    for name in ("saved", "locked"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


async def test_entries_are_apart_by_kind_and_by_key(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    other: dict[str, object] = {**KEY, "num_tokens": 65}
    state.save("quality", KEY, entry(), {"a": 1.0})
    assert state.load("speed", KEY, entry()) is None
    assert state.load("quality", other, entry(other)) is None
    assert state.load("quality", dict(reversed(KEY.items())), entry()) == {"a": 1.0}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: "", "not a complete JSON document"),
        (lambda text: text[: len(text) // 2], "not a complete JSON document"),
        (lambda text: "[" * 100_000, "not a complete JSON document"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"a": 1.5', '"a": 2.5'), "sha256"),
        (lambda text: text.replace('"num_tokens": 64', '"num_tokens": 65'), "key"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "allowed: 1"),
    ],
)
async def test_damaged_entry_is_reported_and_made_anew(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[str], str],
    reason: str,
) -> None:
    state = StateDirectory(tmp_path)
    state.save("quality", KEY, entry(), {"a": 1.5})
    path = state.path_of("quality", KEY)
    intact = path.read_text()
    path.write_text(damage(intact))
    assert path.read_text() != intact

    assert await state.load_or_make("quality", KEY, entry(), maker({"a": 3.5})) == {"a": 3.5}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(path) in warning
    assert reason in warning
    assert await state.load_or_make("quality", KEY, entry(), never()) == {"a": 3.5}


async def test_foreign_entry_is_reported_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory(tmp_path)
    other: dict[str, object] = {"model": "sha256:2", "num_tokens": 64}
    state.save("quality", other, entry(other), {"a": 1.0})
    state.path_of("quality", other).rename(state.path_of("quality", KEY))

    assert await state.load_or_make("quality", KEY, entry(), maker({"a": 2.0})) == {"a": 2.0}
    assert "made for another model" in caplog.text


async def test_entry_of_another_shape_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateDirectory(tmp_path)
    texts: JsonEntry[dict[str, str]] = JsonEntry(dict[str, str], KEY)
    state.save("quality", KEY, texts, {"a": "one"})
    assert state.load("quality", KEY, entry()) is None
    assert "content.a" in caplog.text


async def test_nothing_else_is_left_in_the_directory(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    await state.load_or_make("quality", KEY, entry(), maker({"a": 1.0}))
    path = state.path_of("quality", KEY)
    assert set(tmp_path.iterdir()) <= {path, path.with_suffix(".lock")}


async def test_directory_that_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    state = StateDirectory(tmp_path / "file" / "state")
    assert await state.load_or_make("quality", KEY, entry(), maker({"a": 1.0})) == {"a": 1.0}
    assert "cannot be kept for the next start" in caplog.text


def test_full_disk_leaves_the_old_entry(tmp_path: Path) -> None:
    """The limit on the size of files stands for a full disk: writing fails half-way."""
    script = f"""
import logging, resource
from server.state import JsonEntry, StateDirectory
from pathlib import Path
logging.basicConfig()
state = StateDirectory(Path({str(tmp_path)!r}))
entry = JsonEntry(dict[str, float], {KEY!r})
state.save("quality", {KEY!r}, entry, {{"a": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
state.save("quality", {KEY!r}, entry, {{str(i): i for i in range(100_000)}})
assert state.load("quality", {KEY!r}, entry) == {{"a": 1.0}}
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "cannot be kept for the next start" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [
        StateDirectory(tmp_path).path_of("quality", KEY).name
    ]


def test_servers_that_start_together_make_an_entry_once(tmp_path: Path) -> None:
    (tmp_path / "waiting").mkdir()
    script = f"""
import asyncio, logging, os
from server.state import JsonEntry, StateDirectory
from pathlib import Path
directory = Path({str(tmp_path / "state")!r})
made = Path({str(tmp_path / "made")!r})
waiting = Path({str(tmp_path / "waiting")!r})
class WaitingServers(logging.Handler):
    def emit(self, record):
        if "waiting for another server" in record.getMessage():
            (waiting / str(os.getpid())).touch()
logging.basicConfig(level=logging.INFO, handlers=[WaitingServers()])
async def make():
    with made.open("a") as file:
        file.write("x")
    while made.read_text() == "x" and len(list(waiting.iterdir())) < 3:
        await asyncio.sleep(0.01)
    return {{"process": os.getpid()}}
async def main():
    entry = JsonEntry(dict[str, int], {KEY!r})
    print(await StateDirectory(directory).load_or_make("quality", {KEY!r}, entry, make))
asyncio.run(main())
"""
    servers = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    printed = {server.communicate()[0] for server in servers}
    assert [server.returncode for server in servers] == [0] * 4
    assert (tmp_path / "made").read_text() == "x"
    assert len(printed) == 1


async def test_wait_for_a_lock_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    patient, hasty = StateDirectory(tmp_path), StateDirectory(tmp_path, lock_seconds=0.5)
    async with patient.locked("quality", KEY):
        assert await hasty.load_or_make("quality", KEY, entry(), maker({"a": 1.0})) == {"a": 1.0}
    assert "waiting for another server" in caplog.text
    assert "going on without" in caplog.text


async def test_lock_of_a_server_that_died_is_free(tmp_path: Path) -> None:
    script = f"""
import asyncio, os
from server.state import StateDirectory
from pathlib import Path
async def main():
    async with StateDirectory(Path({str(tmp_path)!r})).locked("quality", {KEY!r}):
        os._exit(9)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    async with asyncio.timeout(5), StateDirectory(tmp_path, math.inf).locked("quality", KEY):
        pass


async def test_failure_to_make_releases_the_lock(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with pytest.raises(AssertionError, match="on purpose"):
        await state.load_or_make("quality", KEY, entry(), never("on purpose"))
    async with asyncio.timeout(5), StateDirectory(tmp_path, math.inf).locked("quality", KEY):
        pass


def test_entries_can_be_read_by_people(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.save("quality", KEY, entry(), {"a": 1.0})
    document = json.loads(state.path_of("quality", KEY).read_text())
    assert document["key"] == KEY
    assert document["content"] == {"a": 1.0}
