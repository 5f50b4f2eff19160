from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.text import TextError, load_texts, token_windows
from tests.conftest import data_path


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo €\n")
    assert load_texts(source) == ["one\n\ntwo €\n"]


def test_json_lines(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines, but not in JSON lines.
    lines = ['{"text": "one", "id": 1}', '"two\u2028half"', "", '{"text": " "}', '"three"']
    assert load_texts(write(tmp_path / "a.jsonl", "\n".join(lines))) == [
        "one",
        "two\u2028half",
        "three",
    ]


def test_json_list(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", json.dumps(["one", {"text": "two"}], indent=1))
    assert load_texts(source) == ["one", "two"]


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '"first"')
    write(tmp_path / "c" / "d.json", '["third"]')
    write(tmp_path / "README.md", "no text")
    write(tmp_path / "empty.txt", "")
    assert load_texts(str(tmp_path)) == ["first", "second", "third"]


def test_real_texts() -> None:
    texts = load_texts(str(data_path("text")))
    assert len(texts) == 4 + 1000
    assert load_texts(str(data_path("text/tinystories_1000.json"))) == texts[4:]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@given(limit=st.integers(1, 30))
def test_max_characters(tmp_path_factory: pytest.TempPathFactory, name: str, limit: int) -> None:
    documents = ["one\ntwo", "three", "four\n\nfive"]
    contents = {
        "a.txt": "".join(documents),
        "a.jsonl": "\n".join(map(json.dumps, documents)),
        "a.json": json.dumps(documents),
    }
    source = write(tmp_path_factory.getbasetemp() / name, contents[name])
    whole = load_texts(source)
    texts = load_texts(source, max_characters=limit)
    assert "".join(texts) == "".join(whole)[:limit]
    assert texts[:-1] == whole[: len(texts) - 1]


def test_refuses_no_characters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_characters: got 0, allowed: 1 or more"):
        load_texts(write(tmp_path / "a.txt", "text"), max_characters=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt: empty, allowed: at least one document with text"),
        ("a.txt", " \n\t\n", r"a\.txt: empty"),
        ("a.jsonl", '{"text": ""}\n""\n', r"a\.jsonl: empty"),
        ("a.json", "[]", r"a\.json: empty"),
        ("a.txt", b"one\ntwo \xe9\n", r"a\.txt, line 2: byte 0xe9 at offset 4 is not UTF-8"),
        ("a.jsonl", b'"one"\n"\xff"\n', r"a\.jsonl, line 2: byte 0xff at offset 1 is not UTF-8"),
        ("a.json", b'["one",\n"\xff"]', r"a\.json, line 2: byte 0xff at offset 1 is not UTF-8"),
        ("a.jsonl", '"one"\n\n{"text": "two"\n', r"a\.jsonl, line 3: not JSON: "),
        ("a.json", '["one",\n"two"', r"a\.json, line 2: not JSON: "),
        ("a.json", "[" * 100_000, r"a\.json, line 1: JSON nested too deeply"),
        ("a.json", '{"text": "one"}', r"a\.json: not a list, allowed: a JSON list of a string or"),
        ("a.jsonl", '"one"\n3\n', r'line 2: found int, allowed: .* object with a string "text"'),
        ("a.jsonl", '{"body": "one"}', r"line 1: found an object with keys \['body'\], allowed"),
        ("a.json", '["one", null]', r"a\.json, item 1: found NoneType, allowed: a string or"),
        ("a.json", r'["one", "\ud800"]', r"item 1: half of a surrogate pair at character 0"),
        ("a.pdf", "text", r"a\.pdf: a file \.pdf, allowed: \.json, \.jsonl, \.txt"),
        ("a", "text", r"a: a file with no suffix, allowed: \.json, \.jsonl, \.txt"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        load_texts(write(tmp_path / name, content))


def test_damage_in_a_directory_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "b" / "c.jsonl", "'no'")
    with pytest.raises(TextError, match=r"b/c\.jsonl, line 1: not JSON"):
        load_texts(str(tmp_path))


def test_refuses_a_directory_without_text(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "text")
    with pytest.raises(TextError, match=r"no files in it, allowed: \.json, \.jsonl, \.txt"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize("source", ["absent.txt", "./absent", "/absent/text", "~/absent text"])
def test_refuses_a_missing_file(source: str) -> None:
    with pytest.raises(TextError, match="no such file or directory, allowed: a file"):
        load_texts(source)


def test_refuses_no_source() -> None:
    with pytest.raises(TextError, match="calibration text: got '', allowed: a file"):
        load_texts("")


def test_a_dataset_needs_its_package() -> None:
    if importlib.util.find_spec("datasets") is not None:
        pytest.skip("the package datasets is installed")
    with pytest.raises(TextError, match=r"'some/name:config:test': .* pip install datasets"):
        load_texts("some/name:config:test")


def test_a_dataset_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    # The package takes a directory for a dataset, too: a real one with no network.
    rows = [{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two", "id": 3}]
    write(tmp_path / "corpus" / "test.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "corpus" / "train.jsonl", json.dumps({"text": "three", "id": 4}))
    monkeypatch.chdir(tmp_path)
    assert load_texts("corpus:default:test") == ["one", "two"]
    assert load_texts("corpus::test", max_characters=4) == ["one", "t"]
    assert load_texts("corpus:default") == ["three"]
    with pytest.raises(TextError, match=r"'corpus::absent': cannot be read as a dataset: .*absent"):
        load_texts("corpus::absent")


documents_ = st.lists(st.integers(0, 30)).map(
    lambda lengths: [[100 * i + t for t in range(n)] for i, n in enumerate(lengths)]
)


@given(documents_, st.integers(1, 12), st.data())
def test_windows(documents: list[list[int]], window: int, data: st.DataObject) -> None:
    min_window = data.draw(st.integers(1, window))
    max_tokens = data.draw(st.integers(min_window, 200))
    pieces = [
        (start, index, document[start : start + window])
        for index, document in enumerate(documents)
        for start in range(0, len(document), window)
    ]
    expected, room = [], max_tokens
    for _, _, piece in sorted(p for p in pieces if len(p[2]) >= min_window):
        if room >= min_window:
            expected.append(piece[:room])
            room -= len(expected[-1])
    if expected:
        assert token_windows(iter(documents), window, max_tokens, min_window) == expected
        assert sum(map(len, expected)) <= max_tokens
    else:
        with pytest.raises(TextError, match=f"no text of {min_window} or more tokens is left"):
            token_windows(documents, window, max_tokens, min_window)


def test_windows_spread_over_documents() -> None:
    documents = [list(range(100)), list(range(100, 200)), list(range(200, 300))]
    windows = token_windows(documents, window=10, max_tokens=60)
    assert [window[0] for window in windows] == [0, 100, 200, 10, 110, 210]
    assert all(b == a + 1 for window in windows for a, b in pairwise(window))


def test_documents_beyond_those_needed_are_not_read() -> None:
    def documents() -> Iterator[list[int]]:
        yield [1, 2, 3]
        yield [4, 5, 6]
        pytest.fail("read on")

    assert token_windows(documents(), window=3, max_tokens=5) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("window", "max_tokens", "min_window", "message"),
    [(1, 10, 2, "min_window"), (8, 1, 2, "max_tokens"), (8, 10, 0, "min_window")],
)
def test_refuses_windows_that_cannot_be(
    window: int, max_tokens: int, min_window: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows([[1, 2, 3]], window, max_tokens, min_window)


@pytest.mark.parametrize("source", ["x" * 5000, "./" + "x" * 300, "~nobody-like-this/text.txt"])
def test_names_that_no_file_can_have(source: str) -> None:
    with pytest.raises(TextError, match="allowed: a file"):
        load_texts(source)


def test_a_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(TextError, match=r"pipe\.txt: not a file, allowed: a file"):
        load_texts(str(tmp_path / "pipe.txt"))


@pytest.mark.parametrize("name", ["text.json", "text.jsonl"])
def test_an_integer_of_thousands_of_digits(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("9" * 5000)
    with pytest.raises(TextError, match="line 1: not JSON: Exceeds the limit"):
        load_texts(str(tmp_path / name))
