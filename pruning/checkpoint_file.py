"""Reading of a checkpoint's small files, with errors that name the file and the fault.

Configuration, tokenizer, generation settings, indices and templates are written by many tools and
edited by hand. All of them are read here, so that no fault ends in a traceback.
"""

from __future__ import annotations

import codecs
import json
import reprlib
from pathlib import Path
from typing import Any, NoReturn

# The largest tokenizers take some tens of megabytes.
_MAX_BYTES = 256 << 20


class CheckpointError(ValueError):
    """A model directory is incomplete or damaged."""


def refuse(path: Path, field: str, found: object, allowed: str) -> NoReturn:
    """Raise :class:`CheckpointError` for a field of a file."""
    raise CheckpointError(f"{path}: {field}: found {reprlib.repr(found)}, allowed: {allowed}")


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises :class:`CheckpointError`, naming the file, where it is missing, is no file, cannot be
    read or is not UTF-8 without a byte order mark, which is all that transformers reads.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, allowed: a file")
    if not path.exists():
        link = "a link to a file that is missing" if path.is_symlink() else "missing"
        raise CheckpointError(f"{path}: {link}")
    if not path.is_file():  # it could be a pipe that nobody writes to
        raise CheckpointError(f"{path}: neither a file nor a link to one")
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, allowed: {_MAX_BYTES} or fewer")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CheckpointError(
            f"{path}: begins with a byte order mark, allowed: UTF-8 text without one"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8, "
            "allowed: UTF-8 text"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises :class:`CheckpointError`, naming the file, for anything else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a complete JSON document: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: allowed: a JSON object, found: {reprlib.repr(content)}")
    return content


def read_optional_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one where there is no such file."""
    # A dangling link is there: it was meant to be a file.
    return read_object(path) if path.exists() or path.is_symlink() else {}
