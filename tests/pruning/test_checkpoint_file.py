"""The small files of a checkpoint: every fault is reported with the path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.checkpoint_file import CheckpointError, read_object, read_optional_object, read_text

Damage = Callable[[Path], object]


def _link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("absent"))


def _unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.touch(0)


# Functions that write a file which is no JSON object, each with a part of the error.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a complete JSON document"),
    "cut short": (lambda path: path.write_text('{"a": [1, '), "not a complete JSON document"),
    "two documents": (lambda path: path.write_text("{}{}"), "not a complete JSON document"),
    "a comment": (lambda path: path.write_text("{} // no"), "not a complete JSON document"),
    "nested too deeply": (lambda path: path.write_text("[" * 100_000), "not a complete JSON"),
    "a huge integer": (lambda path: path.write_text("9" * 5000), "not a complete JSON document"),
    "NUL": (lambda path: path.write_bytes(bytes(64)), "not a complete JSON document"),
    "a list": (lambda path: path.write_text("[1]"), "allowed: a JSON object, found: [1]"),
    "null": (lambda path: path.write_text("null"), "allowed: a JSON object, found: None"),
    "a string": (lambda path: path.write_text('"a"'), "allowed: a JSON object, found: 'a'"),
    "byte order mark": (
        lambda path: path.write_bytes(b"\xef\xbb\xbf{}"),
        "begins with a byte order mark, allowed: UTF-8 text without one",
    ),
    "UTF-16": (lambda path: path.write_bytes("{}".encode("utf-16")), "byte order mark"),
    "UTF-32": (lambda path: path.write_bytes("{}".encode("utf-32")), "byte order mark"),
    "Latin-1": (lambda path: path.write_bytes(b'{"\xe9": 1}'), "byte 0xe9 at offset 2 is not UTF"),
    "a directory": (lambda path: path.mkdir(), "a directory, allowed: a file"),
    "a link to nothing": (_link_to_nothing, "a link to a file that is missing"),
    "a pipe": (lambda path: os.mkfifo(path), "neither a file nor a link to one"),
    "unreadable": (_unreadable, "cannot be read: Permission denied"),
}


@pytest.mark.parametrize(("damage", "problem"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("read", [read_object, read_optional_object])
def test_what_is_wrong_is_said(
    tmp_path: Path, read: Callable[[Path], object], damage: Damage, problem: str
) -> None:
    path = tmp_path / "some file.json"
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json: missing$"):
        read_object(tmp_path / "absent.json")
    assert read_optional_object(tmp_path / "absent.json") == {}


def test_what_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(CheckpointError, match="268435457 bytes, allowed: 268435456 or fewer"):
        read_text(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), json_values))
def test_every_object_is_read(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.mktemp("objects") / "object.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_object(path) == content


@given(st.binary())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "bytes.json"
    path.write_bytes(content)
    assert outcome(lambda: read_object(path)).startswith(("read", f"{path}: "))


def outcome(read: Callable[[], object]) -> str:
    """Return the error of a file, or that it is read."""
    try:
        read()
    except CheckpointError as error:
        return str(error)
    return "read"
