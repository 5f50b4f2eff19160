"""Headers of safetensors files: the names, types and places of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

from pruning.checkpoint_file import CheckpointError

# A safetensors file begins with the number of header bytes, little-endian.
LENGTH_BYTES = 8
# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_GIT_LFS = b"version https://git-lfs"


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file, after checking it."""
    names: set[str] = json.loads(read_header(path)).keys() - {"__metadata__"}
    return names


def read_header(path: Path) -> bytes:
    """Return the header of a safetensors file, after checking it and the file's size.

    The header is the JSON text that names the tensors, without the length before it. Raises
    :class:`CheckpointError` for a file that is shorter or longer than its header says, and for
    one that the safetensors library refuses.
    """
    from safetensors import SafetensorError

    if not path.is_file():
        raise CheckpointError(f"{path}: not a file, or a link to one that is missing")
    try:
        return _read_header(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _read_header(path: Path) -> bytes:
    from safetensors import safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(len(_GIT_LFS))
        if prefix == _GIT_LFS:
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; git lfs pull")
        num_header_bytes = int.from_bytes(prefix[:LENGTH_BYTES], "little")
        if size < LENGTH_BYTES or not 2 <= num_header_bytes <= _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file ({size} bytes)")
        file.seek(LENGTH_BYTES)
        header = file.read(num_header_bytes)
    if len(header) < num_header_bytes:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, but the header alone takes "
            f"{LENGTH_BYTES + num_header_bytes}"
        )
    expected = LENGTH_BYTES + num_header_bytes + _num_data_bytes(path, header)
    if size != expected:
        problem = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path}: {problem}: {size} bytes, its header says {expected}")
    with safe_open(path, framework="np"):
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
