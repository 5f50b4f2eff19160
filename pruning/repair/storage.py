"""Files of repair maps, and of gated MLPs: safetensors, trusted only as they were written.

The metadata has a description, a JSON object whose ``kind`` says what stands in:

- ``closed-form`` and ``healed``: a map [hidden, hidden] for each of its ``layers``,
  ``layers.N.repair.weight``;
- ``gated-mlp``: MLPs of its ``intermediate_size``, one for each of its ``runs`` of skipped layers,
  ``layers.N.gated_mlp.weight`` for the run that begins with layer N, [3, intermediate, hidden].

``healing`` says how what was trained was trained, and for which ``skipped`` layers.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.durable import replace_file
from pruning.repair.errors import RepairError
from pruning.repair.gated_mlp import GatedMlp, GatedMlps
from pruning.repair.maps import Healing, HealingKind, LayerMap, RepairMaps
from pruning.repair.tensor_file import read_description, read_tensors, write_tensors
from pruning.tensor_header import read_header

if TYPE_CHECKING:
    import torch

# Version 1 had no ``kind``: all maps were in closed form.
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)
_CLOSED_FORM, _HEALED, _GATED = "closed-form", "healed", "gated-mlp"
_KINDS = (_CLOSED_FORM, _HEALED, _GATED)
_KEY = "fathom_repair"


@dataclass(frozen=True, slots=True)
class MapsSummary:
    """What a file of maps or gated MLPs holds, without the tensors.

    ``num_bytes`` is the size of the tensors, ``num_tokens`` how many tokens they were fitted on,
    and ``unexplained`` that of :class:`pruning.repair.maps.LayerMap`, by layer; MLPs have none.
    ``healing`` and ``healing_kind`` are None for maps in closed form.
    """

    fingerprint: str
    num_bytes: int
    num_tokens: int
    unexplained: dict[int, float]
    healing: Healing | None
    healing_kind: HealingKind | None


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
    _write(path, description, tensors)


def save_gated_mlps(mlps: GatedMlps, path: Path) -> None:
    """Write the MLPs; a reader sees the old file or the new one, never a part."""
    tensors = {_mlp_name(first): m.weight.contiguous().cpu() for first, m in mlps.layers.items()}
    description = {
        "format_version": FORMAT_VERSION,
        "kind": _GATED,
        "num_layers": mlps.num_layers,
        "model_fingerprint": mlps.model_fingerprint,
        "text_fingerprint": mlps.text_fingerprint,
        "num_tokens": mlps.num_tokens,
        "intermediate_size": mlps.intermediate_size,
        "runs": mlps.runs,
        "healing": asdict(mlps.healing),
    }
    _write(path, description, tensors)


def load_maps(path: Path) -> RepairMaps:
    """Read the maps that :func:`save_maps` wrote.

    Raises :class:`RepairError`, naming the file, for one that is damaged, of another format or
    no file of maps at all, and :class:`OSError` for one that cannot be read.
    """
    found = load_stand_ins(path)
    if not isinstance(found, RepairMaps):
        raise RepairError(f"{path}: kind: found '{_GATED}', allowed: {_CLOSED_FORM}, {_HEALED}")
    return found


def load_stand_ins(path: Path) -> RepairMaps | GatedMlps:
    """Read what :func:`save_maps` or :func:`save_gated_mlps` wrote.

    Raises as :func:`load_maps` does.
    """
    text, tensors = read_tensors(_KEY, path)
    try:
        description = _description(text)
        return (_gated_mlps if _kind(description) == _GATED else _maps)(description, tensors)
    except RepairError as error:
        raise RepairError(f"{path}: {error}") from None


def maps_fingerprint(path: Path) -> str:
    """Return what tells the maps or MLPs in ``path`` from all others, without reading all of them.

    Raises as :func:`load_stand_ins` does for a file whose header is none of these.
    """
    return summarize_maps(path).fingerprint


def summarize_maps(path: Path) -> MapsSummary:
    """Return what the header of the file says; :func:`load_stand_ins` checks the rest.

    Raises as :func:`load_stand_ins` does for a file whose header is none of maps or MLPs.
    """
    text, digest = read_description(_KEY, path)
    try:
        description = _description(text)
        kind = _kind(description)
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
                    for layer, about in ({} if kind == _GATED else description["layers"]).items()
                },
                None if kind == _CLOSED_FORM else _healing(description),
                None if kind == _CLOSED_FORM else "gated-mlp" if kind == _GATED else "maps",
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RepairError(f"its description is damaged: {error!r}") from None
    except RepairError as error:
        raise RepairError(f"{path}: {error}") from None


def _write(path: Path, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    replace_file(path, write_tensors(_KEY, json.dumps(description, allow_nan=False), tensors))


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
            healing=None if _kind(description) == _CLOSED_FORM else _healing(description),
        )
    except RepairError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RepairError(f"its description is damaged: {error!r}") from None


def _gated_mlps(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> GatedMlps:
    try:
        mlps = GatedMlps(
            layers={
                int(run[0]): GatedMlp(tensors[_mlp_name(int(run[0]))])
                for run in description["runs"]
            },
            num_layers=int(description["num_layers"]),
            model_fingerprint=str(description["model_fingerprint"]),
            text_fingerprint=str(description["text_fingerprint"]),
            num_tokens=int(description["num_tokens"]),
            healing=_healing(description),
        )
        runs, size = [list(run) for run in mlps.runs], description["intermediate_size"]
        if (description["runs"], size) != (runs, mlps.intermediate_size):
            raise RepairError("its description is damaged: it is not that of its MLPs")
    except RepairError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RepairError(f"its description is damaged: {error!r}") from None
    return mlps


def _kind(description: Mapping[str, Any]) -> str:
    kind = description.get("kind", _CLOSED_FORM)
    if kind not in _KINDS:
        raise RepairError(f"kind: found {reprlib.repr(kind)}, allowed: {', '.join(_KINDS)}")
    return str(kind)


def _healing(description: Mapping[str, Any]) -> Healing:
    about = dict(description["healing"])
    skipped = tuple(int(layer) for layer in about.pop("skipped"))
    return Healing(skipped=skipped, **about)


def _name(layer: int) -> str:
    return f"layers.{layer}.repair.weight"


def _mlp_name(first: int) -> str:
    return f"layers.{first}.gated_mlp.weight"
