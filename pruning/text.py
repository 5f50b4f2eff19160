"""Calibration text: reading it, and cutting it into windows of tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

_SUFFIXES = (".json", ".jsonl", ".txt")
_ALLOWED_LINE = 'a string or an object with a string "text"'
_ALLOWED_SOURCE = (
    f"a file ({', '.join(_SUFFIXES)}), a directory of such files, "
    "or a Hugging Face dataset as name[:config][:split]"
)


class TextError(ValueError):
    """Calibration text that is missing, empty or cannot be read."""


def load_texts(source: str, *, max_characters: int | None = None) -> list[str]:
    """Return the documents of ``source``, at most ``max_characters`` of them in total.

    ``source`` is one of

    - a file: ``.txt`` is one document, ``.jsonl`` has one on each line, ``.json`` is a list of
      them; in both a document is a string or an object with a string ``text``;
    - a directory: all such files below it, by path;
    - ``name[:config][:split]`` of a Hugging Face dataset with a column ``text``, where the
      package ``datasets`` is installed; the split is ``train`` unless named.

    Files are UTF-8. Blank documents are left out, and the last document is cut to fit
    ``max_characters``. Raises :class:`TextError`, naming file and line, for a source that cannot
    be read or has no text.
    """
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters: got {max_characters}, allowed: 1 or more")
    remaining = max_characters
    texts: list[str] = []
    for text in _documents(source, max_characters):
        if not text.strip():
            continue
        texts.append(text[:remaining])
        if remaining is not None:
            remaining -= len(texts[-1])
            if remaining == 0:
                break
    if not any(text.strip() for text in texts):
        raise TextError(f"{source}: empty, allowed: at least one document with text")
    return texts


def token_windows(
    token_ids_of_documents: Iterable[Sequence[int]],
    window: int,
    max_tokens: int,
    min_window: int = 2,
) -> list[list[int]]:
    """Cut documents into windows of at most ``window`` and at least ``min_window`` tokens.

    Takes the first window of each document, then the second of each, and so on, until there are
    ``max_tokens`` tokens or no more text, so that a long document does not crowd out the others.
    The last window is cut to fit. Documents that are not needed are not read. The caller adds
    tokens that begin a text. Raises :class:`TextError` if there is no window.
    """
    if not 1 <= min_window <= window:
        raise ValueError(f"min_window: got {min_window}, allowed: 1 to {window}, the window")
    if max_tokens < min_window:
        raise ValueError(f"max_tokens: got {max_tokens}, allowed: {min_window} or more")
    windows: list[list[int]] = []
    remaining = max_tokens
    for piece in _round_robin(token_ids_of_documents, window):
        if len(piece) >= min_window:
            windows.append(list(piece[:remaining]))
            remaining -= len(windows[-1])
        if remaining < min_window:
            break
    if not windows:
        raise TextError(f"no text of {min_window} or more tokens is left to make a window of")
    return windows


def _round_robin(documents: Iterable[Sequence[int]], window: int) -> Iterator[Sequence[int]]:
    unfinished: list[Sequence[int]] = []
    for document in documents:
        yield document[:window]
        if len(document) > window:
            unfinished.append(document)
    start = window
    while unfinished:
        for document in unfinished:
            yield document[start : start + window]
        start += window
        unfinished = [document for document in unfinished if len(document) > start]


def _documents(source: str, max_characters: int | None) -> Iterator[str]:
    if not source:
        raise TextError(f"calibration text: got '', allowed: {_ALLOWED_SOURCE}")
    try:
        path = Path(source).expanduser()
        files = sorted(filter(_is_text, path.rglob("*"))) if path.is_dir() else []
        files = [file for file in files if file.is_file()]
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user as in ~user
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"{source!r}: {reason}, allowed: {_ALLOWED_SOURCE}") from None
    if is_directory:
        if not files:
            raise TextError(f"{source}: no files in it, allowed: {', '.join(_SUFFIXES)}")
        for file in files:
            yield from _file_documents(file, max_characters)
    elif exists:
        yield from _file_documents(path, max_characters)
    elif _is_text(path) or source.startswith((os.sep, "~", ".")):
        raise TextError(f"{source!r}: no such file or directory, allowed: {_ALLOWED_SOURCE}")
    else:
        yield from _dataset_documents(source)


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _file_documents(path: Path, max_characters: int | None) -> Iterator[str]:
    if not path.is_file():  # it could be a pipe that nobody writes to
        raise TextError(f"{path}: not a file, allowed: {_ALLOWED_SOURCE}")
    match path.suffix.lower():
        case ".txt":
            # Each line has at least one character, so more lines are never needed.
            yield "".join(line for _, line in islice(_lines(path), max_characters))
        case ".jsonl":
            for number, line in _lines(path):
                if line.strip():
                    yield _text_of(_parsed(line.strip(), path, number), f"{path}, line {number}")
        case ".json":
            items = _parsed("".join(line for _, line in _lines(path)), path, 1)
            if not isinstance(items, list):
                raise TextError(f"{path}: not a list, allowed: a JSON list of {_ALLOWED_LINE}")
            for index, item in enumerate(items):
                yield _text_of(item, f"{path}, item {index}")
        case suffix:
            raise TextError(
                f"{path}: a file {suffix or 'with no suffix'}, allowed: {', '.join(_SUFFIXES)}"
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Read as bytes, because errors of text files do not name the line.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at offset "
            f"{error.start} is not UTF-8, allowed: UTF-8 text"
        ) from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None


def _parsed(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise TextError(
            f"{path}, line {line}: not JSON: {error.msg} (column {error.colno})"
        ) from None
    except RecursionError:
        raise TextError(f"{path}, line {first_line}: JSON nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise TextError(f"{path}, line {first_line}: not JSON: {error}") from None


def _text_of(value: object, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        found = (
            f"an object with keys {sorted(value)}"
            if isinstance(value, dict)
            else type(value).__name__
        )
        raise TextError(f"{where}: found {found}, allowed: {_ALLOWED_LINE}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: half of a surrogate pair at character {error.start}") from None
    return text


def _dataset_documents(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise TextError(
            f"{source!r}: no such file or directory, and to read it as a Hugging Face dataset "
            f"the package datasets is needed: pip install datasets; allowed: {_ALLOWED_SOURCE}"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _text_of(row, f"{source}, row {number}")
    except TextError:
        raise
    except Exception as error:  # the package documents no base class of what it raises
        raise TextError(f"{source!r}: cannot be read as a dataset: {error}") from error
