"""Repair maps as a safetensors file that is trusted only as it was written."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.durable import replace_file
from pruning.repair.errors import RepairError
from pruning.repair.maps import Healing, LayerMap, RepairMaps
from pruning.repair.tensor_file import read_description, read_tensors, write_tensors
from pruning.tensor_header import read_header

if TYPE_CHECKING:
    import torch

# Version 1 had no ``kind``: all maps were in closed form.
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)
_CLOSED_FORM, _HEALED = "closed-form", "healed"
_KEY = "fathom_repair"


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
    tensors = {_name(layer): m.weight.contiguous().cpu() for layer, m in maps.layers.items()}
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": _CLOSED_FORM if maps.healing is None else _HEALED,
        "num_layers": maps.num_layers,
        "model_fingerprint": maps.model_fingerprint,
        "text_fingerprint": maps.text_fingerprint,
        "num_tokens": maps.num_tokens,
        "layers": {
            str(layer): {"ridge": m.ridge, "unexplained": m.unexplained}
            for layer, m in maps.layers.items()
        },
    }
    if maps.healing is not None:
        description["healing"] = asdict(maps.healing)
    replace_file(path, write_tensors(_KEY, json.dumps(description, allow_nan=False), tensors))


def load_maps(path: Path) -> RepairMaps:
    """Read the maps that :func:`save_maps` wrote.

    Raises :class:`RepairError`, naming the file, for one that is damaged, of another format or
    no file of maps at all, and :class:`OSError` for one that cannot be read.
    """
    text, tensors = read_tensors(_KEY, path)
    try:
        return _maps(_description(text), tensors)
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
    text, digest = read_description(_KEY, path)
    try:
        description = _description(text)
        ends = [
            about["data_offsets"][1]
            for name, about in json.loads(read_header(path)).items()
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
    except RepairError as error:
        raise RepairError(f"{path}: {error}") from None


def _description(text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise RepairError("its description is damaged: it is no JSON object")
    if (version := description.get("format_version")) not in _READ_VERSIONS:
        allowed = ", ".join(map(str, _READ_VERSIONS))
        raise RepairError(f"format_version: found {reprlib.repr(version)}, allowed: {allowed}")
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
            healing=_healing(description),
        )
    except RepairError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RepairError(f"its description is damaged: {error!r}") from None


def _healing(description: Mapping[str, Any]) -> Healing | None:
    match description.get("kind", _CLOSED_FORM):
        case str(kind) if kind == _CLOSED_FORM:
            return None
        case str(kind) if kind == _HEALED:
            about = dict(description["healing"])
            skipped = tuple(int(layer) for layer in about.pop("skipped"))
            return Healing(skipped=skipped, **about)
        case kind:
            allowed = f"{_CLOSED_FORM}, {_HEALED}"
            raise RepairError(f"kind: found {reprlib.repr(kind)}, allowed: {allowed}")


def _name(layer: int) -> str:
    return f"layers.{layer}.repair.weight"
