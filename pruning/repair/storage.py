"""Repair maps as a safetensors file that is trusted only as it was written."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.checkpoint import CheckpointError
from pruning.durable import replace_file
from pruning.repair.errors import RepairError
from pruning.repair.maps import LayerMap, RepairMaps
from pruning.tensor_header import read_header

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
_KEY = "fathom_repair"
_DIGEST_KEY = "sha256"


@dataclass(frozen=True, slots=True)
class MapsSummary:
    """What a file of maps holds, without the maps.

    ``num_bytes`` is the size of the maps, ``num_tokens`` how many tokens they were fitted on, and
    ``unexplained`` that of :class:`pruning.repair.maps.LayerMap`, by layer.
    """

    fingerprint: str
    num_bytes: int
    num_tokens: int
    unexplained: dict[int, float]


def save_maps(maps: RepairMaps, path: Path) -> None:
    """Write the maps; a reader sees the old file or the new one, never a part."""
    from safetensors.torch import save

    tensors = {_name(layer): m.weight.contiguous().cpu() for layer, m in maps.layers.items()}
    description = {
        "format_version": FORMAT_VERSION,
        "num_layers": maps.num_layers,
        "model_fingerprint": maps.model_fingerprint,
        "text_fingerprint": maps.text_fingerprint,
        "num_tokens": maps.num_tokens,
        "layers": {
            str(layer): {"ridge": m.ridge, "unexplained": m.unexplained}
            for layer, m in maps.layers.items()
        },
    }
    text = json.dumps(description, allow_nan=False)
    replace_file(path, save(tensors, {_KEY: text, _DIGEST_KEY: _digest(text, tensors)}))


def load_maps(path: Path) -> RepairMaps:
    """Read the maps that :func:`save_maps` wrote.

    Raises :class:`RepairError`, naming the file, for one that is damaged, of another format or
    no file of maps at all, and :class:`OSError` for one that cannot be read.
    """
    from safetensors.torch import load

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text, digest = _metadata(read_header(path))
        tensors = load(path.read_bytes())
        if digest != _digest(text, tensors):
            raise RepairError("sha256: the maps are not what was written")
        return _maps(_description(text), tensors)
    except CheckpointError as error:
        raise RepairError(str(error)) from None
    except RepairError as error:
        raise RepairError(f"{path}: {error}") from None


def maps_fingerprint(path: Path) -> str:
    """Return what tells the maps in ``path`` from all others, without reading all of them.

    Raises as :func:`load_maps` does for a file whose header is none of maps.
    """
    return summarize_maps(path).fingerprint


def summarize_maps(path: Path) -> MapsSummary:
    """Return what the header of the maps in ``path`` says; :func:`load_maps` checks the rest.

    Raises as :func:`load_maps` does for a file whose header is none of maps.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        header = read_header(path)
        text, digest = _metadata(header)
        description = _description(text)
        ends = [
            about["data_offsets"][1]
            for name, about in json.loads(header).items()
            if name != "__metadata__"
        ]
        try:
            return MapsSummary(
                f"sha256:{digest}",
                max(ends, default=0),
                int(description["num_tokens"]),
                {
                    int(layer): float(about["unexplained"])
                    for layer, about in description["layers"].items()
                },
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RepairError(f"its description is damaged: {error!r}") from None
    except CheckpointError as error:
        raise RepairError(str(error)) from None
    except RepairError as error:
        raise RepairError(f"{path}: {error}") from None


def _metadata(header: bytes) -> tuple[str, str]:
    """Return the description of the maps, as text, and the digest."""
    try:
        metadata = json.loads(header)["__metadata__"]
        return str(metadata[_KEY]), str(metadata[_DIGEST_KEY])
    except (ValueError, LookupError, TypeError):
        raise RepairError("not a file of repair maps") from None


def _description(text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise RepairError("its description is damaged: it is no JSON object")
    if (version := description.get("format_version")) != FORMAT_VERSION:
        raise RepairError(
            f"format_version: found {reprlib.repr(version)}, allowed: {FORMAT_VERSION}"
        )
    return description


def _maps(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> RepairMaps:
    try:
        layers = {
            int(layer): LayerMap(
                tensors[_name(int(layer))], float(about["ridge"]), float(about["unexplained"])
            )
            for layer, about in description["layers"].items()
        }
        return RepairMaps(
            layers=layers,
            num_layers=int(description["num_layers"]),
            model_fingerprint=str(description["model_fingerprint"]),
            text_fingerprint=str(description["text_fingerprint"]),
            num_tokens=int(description["num_tokens"]),
        )
    except RepairError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RepairError(f"its description is damaged: {error!r}") from None


def _name(layer: int) -> str:
    return f"layers.{layer}.repair.weight"


def _digest(description: str, tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
