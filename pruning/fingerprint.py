"""Fingerprints that tell models and texts apart without reading all of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pruning.checkpoint import check_checkpoint, read_config, read_header, weight_files

# Change when the same checkpoint is saved again, and say nothing about the model.
_VOLATILE_KEYS = frozenset({"_commit_hash", "_name_or_path", "transformers_version"})
_CHUNK_BYTES = 4096
_NUM_CHUNKS = 256


def model_fingerprint(directory: str | Path) -> str:
    """Return ``"sha256:..."`` of the local checkpoint in ``directory``.

    It covers ``config.json``, whatever its layout, and of each safetensors file the name, the
    size, the header and a sample of the file: all of it up to 1 MiB, else 256 chunks of 4 KiB
    at equal distances. So it costs 1 MiB of reading for each file, however large, and tells
    trainings of one architecture apart; an edit of a few bytes between the chunks it does not
    see. Raises :class:`pruning.checkpoint.CheckpointError` as ``check_checkpoint`` does.
    """
    directory = Path(directory)
    check_checkpoint(directory)
    config = json.dumps(_stable(read_config(directory)), sort_keys=True)
    parts = [config.encode()]
    for path in weight_files(directory):
        parts += [path.name.encode(), str(path.stat().st_size).encode(), read_header(path)]
        parts += _sample(path)
    return _fingerprint(parts)


def text_fingerprint(texts: Iterable[str]) -> str:
    """Return ``"sha256:..."`` of the texts in their order."""
    return _fingerprint(text.encode("utf-8", "surrogatepass") for text in texts)


def _fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _stable(value: Any) -> Any:
    match value:
        case dict():
            return {k: _stable(v) for k, v in value.items() if k not in _VOLATILE_KEYS}
        case list():
            return [_stable(item) for item in value]
        case _:
            return value


def _sample(path: Path) -> Iterator[bytes]:
    stride = max(path.stat().st_size // _NUM_CHUNKS, _CHUNK_BYTES)
    with path.open("rb") as file:
        for start in range(0, path.stat().st_size, stride):
            file.seek(start)
            yield file.read(_CHUNK_BYTES)
