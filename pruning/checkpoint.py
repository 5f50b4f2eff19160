"""Whether a directory holds a whole model: configuration, weights, every shard of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Leads every safetensors file: the number of header bytes, little-endian.
_LENGTH_BYTES = 8
# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_GIT_LFS = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A model directory is incomplete or damaged."""


def check_checkpoint(directory: str | Path) -> None:
    """Raise :class:`CheckpointError`, naming the file, unless ``directory`` holds a whole model.

    That is: a ``config.json``, at least one safetensors file, each of them as long as its header
    says, and every shard that an index names. Reads headers only, no weights.
    """
    directory = Path(directory)
    read_config(directory)
    paths = weight_files(directory)
    for path in paths:
        read_header(path)
    for index in sorted(directory.glob("*.safetensors.index.json")):
        _check_index(index)


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of ``config.json``."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory, allowed: a model directory")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model directory holds a config.json")
    return _read_object(path)


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, at least one, by name."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        others = sorted(path.name for path in directory.iterdir() if path.is_file())
        raise CheckpointError(
            f"{directory}: holds no weights, allowed: one or more *.safetensors files; "
            f"found {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}"
        )
    return paths


def read_header(path: Path) -> bytes:
    """Return the header of a safetensors file, after checking it and the file's size.

    The header is the JSON text that names the tensors, without the length that precedes it.
    Raises :class:`CheckpointError` for a file that is shorter or longer than its header says
    and for one that the safetensors library refuses.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: not a file, or a link to one that is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(len(_GIT_LFS))
        if prefix == _GIT_LFS:
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; git lfs pull")
        num_header_bytes = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or not 2 <= num_header_bytes <= _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file ({size} bytes)")
        file.seek(_LENGTH_BYTES)
        header = file.read(num_header_bytes)
    if len(header) < num_header_bytes:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, but the header alone takes "
            f"{_LENGTH_BYTES + num_header_bytes}"
        )
    expected = _LENGTH_BYTES + num_header_bytes + _num_data_bytes(path, header)
    if size != expected:
        problem = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path}: {problem}: {size} bytes, its header says {expected}")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return header


def _num_data_bytes(path: Path, header: bytes) -> int:
    try:
        tensors = json.loads(header)
        return max(
            (int(tensors[name]["data_offsets"][1]) for name in tensors if name != "__metadata__"),
            default=0,
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: damaged: its header does not describe tensors") from None


def _check_index(path: Path) -> None:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(f"{path}: weight_map: allowed: an object of file names")
    missing = sorted(
        shard for shard in set(weight_map.values()) if not (path.parent / shard).is_file()
    )
    if missing:
        raise CheckpointError(
            f"{path.parent / missing[0]}: missing, though {path.name} names it "
            f"({len(missing)} of {len(set(weight_map.values()))} shards are missing)"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a complete JSON document: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: allowed: a JSON object")
    return content
