"""Fingerprints: which model, which tokenizer and which texts something was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pruning.checkpoint import CheckpointError, check_checkpoint, read_config, weight_files
from pruning.checkpoint_file import read_optional_object

# Returns the SHA-256 of a file's content, in hexadecimal.
FileHash = Callable[[Path], str]

# Change when the same checkpoint is saved again, and say nothing about the model.
_VOLATILE_KEYS = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})
# Reading several files at a time is what a fast disk takes.
_NUM_THREADS = 4

_TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that tokenizers are loaded from, besides tokenizer_config.json.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_TOKENIZER_PATTERNS = ("*.tiktoken", "tokenizer.model.*")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's whole content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(directory: str | Path, file_hash: FileHash = file_sha256) -> str:
    """Return ``"sha256:..."`` of the local checkpoint in ``directory``.

    It covers ``config.json``, whatever its layout, the code that it names, and every byte of the
    weights that are loaded (:mod:`pruning.weights`), under the names of their files.
    ``file_hash`` may remember what it has read before: it is called with each of these files.
    Raises :class:`pruning.checkpoint.CheckpointError` as ``check_checkpoint`` does and for files
    that cannot be read.
    """
    directory = Path(directory)
    check_checkpoint(directory)
    config = read_config(directory)
    files = weight_files(directory)
    if "auto_map" in config:
        files += _code_files(directory)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        hashes = list(pool.map(lambda path: _hash_of(path, file_hash), files))
    parts = [json.dumps(_stable(config), sort_keys=True)]
    for path, digest in zip(files, hashes, strict=True):
        parts += [path.name, digest]
    return _fingerprint(map(_encoded, parts))


def tokenizer_fingerprint(directory: str | Path) -> str:
    """Return ``"sha256:..."`` of all that decides which tokens a text has.

    That is the files of the tokenizer and its code, but for chat templates: texts that are
    measured on are no chats. Raises :class:`CheckpointError` for a file that cannot be read and
    for a ``tokenizer_config.json`` that is not an object.
    """
    directory = Path(directory)
    config = read_optional_object(directory / _TOKENIZER_CONFIG)
    parts = [json.dumps(_stable(config, {"chat_template"}), sort_keys=True)]
    paths = {directory / name for name in _TOKENIZER_FILES}
    for pattern in _TOKENIZER_PATTERNS:
        paths |= set(directory.glob(pattern))
    if "auto_map" in config:
        paths |= set(_code_files(directory))
    for path in sorted(paths):
        if path.is_file():
            parts += [path.name, _hash_of(path, file_sha256)]
    return _fingerprint(map(_encoded, parts))


def text_fingerprint(texts: Iterable[str]) -> str:
    """Return ``"sha256:..."`` of the texts in their order."""
    return _fingerprint(map(_encoded, texts))


def token_fingerprint(windows: Iterable[Sequence[int]]) -> str:
    """Return ``"sha256:..."`` of windows of token ids in their order."""
    return _fingerprint(",".join(map(str, window)).encode() for window in windows)


def files_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """Return ``"sha256:..."`` of files, each given as (name, path), in their order.

    Raises :class:`CheckpointError` for a file that cannot be read.
    """
    parts = (part for name, path in files for part in (name, _hash_of(path, file_sha256)))
    return _fingerprint(map(_encoded, parts))


def _hash_of(path: Path, file_hash: FileHash) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _code_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.py") if path.is_file())


def _fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _stable(value: Any, left_out: Iterable[str] = ()) -> Any:
    ignored = _VOLATILE_KEYS.union(left_out)
    match value:
        case dict():
            return {k: _stable(v, left_out) for k, v in value.items() if k not in ignored}
        case list():
            return [_stable(item, left_out) for item in value]
        case _:
            return value
