"""Safetensors files with a description and a digest, trusted only as they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.checkpoint import CheckpointError
from pruning.repair.errors import RepairError
from pruning.tensor_header import read_header

if TYPE_CHECKING:
    import torch

_DIGEST_KEY = "sha256"


def write_tensors(key: str, description: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the content of the file; ``key`` names the kind of description."""
    from safetensors.torch import save

    return save(dict(tensors), {key: description, _DIGEST_KEY: _digest(description, tensors)})


def read_tensors(key: str, path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the description and the tensors of a file with a description under ``key``.

    Raises :class:`RepairError`, naming the file, for one that is damaged or of another kind, and
    :class:`OSError` for one that cannot be read.
    """
    from safetensors.torch import load

    description, digest = read_description(key, path)
    tensors = load(path.read_bytes())
    if digest != _digest(description, tensors):
        raise RepairError(f"{path}: sha256: its tensors are not what was written")
    return description, tensors


def read_description(key: str, path: Path) -> tuple[str, str]:
    """Return the description and the digest, without reading the tensors.

    Raises as :func:`read_tensors` does for a file whose header is none of this kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise RepairError(str(error)) from None
    try:
        metadata = json.loads(header)["__metadata__"]
        return str(metadata[key]), str(metadata[_DIGEST_KEY])
    except (ValueError, LookupError, TypeError):
        raise RepairError(f"{path}: not a file of repair maps or gated MLPs") from None


def _digest(description: str, tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
