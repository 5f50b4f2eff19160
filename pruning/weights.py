"""The files that a model's weights are loaded from: the same ones that vLLM loads.

vLLM reads every ``*.safetensors`` of the directory, or only those that a
``model.safetensors.index.json`` names, if there is one. It reads no other index, and it reads
every tensor of a file, whatever the index says. Files are read in the natural order of their
names; if several files have a tensor, that of the last one is used. transformers has other rules,
so :func:`loadable_view` shows it the same weights.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruning.checkpoint_file import CheckpointError, read_object, refuse
from pruning.tensor_header import tensor_names

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def weight_files(directory: Path) -> list[Path]:
    """Return the files that are loaded, at least one, in the order of loading.

    Raises :class:`CheckpointError` if there are none, or if the index names files that are missing.
    """
    present = _present(directory)
    if not present:
        others = sorted(path.name for path in directory.iterdir() if path.is_file())
        raise CheckpointError(
            f"{directory}: holds no weights, allowed: one or more *{_SUFFIX} files; "
            f"found {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}"
        )
    if (named := _named(directory)) is None:
        return present
    names = {path.name for path in present}
    missing = sorted(named - names)
    if missing:
        raise CheckpointError(
            f"{directory / missing[0]}: missing, though {INDEX} names it "
            f"({len(missing)} of {len(named)} shards are missing)"
        )
    return [path for path in present if path.name in named]


def weight_bytes(directory: Path) -> int:
    """Return the size of the files that are loaded."""
    return sum(path.stat().st_size for path in weight_files(directory))


def stray_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of the directory that are not loaded."""
    loaded = set(weight_files(directory))
    return [path for path in _present(directory) if path not in loaded]


def indexed_tensors(directory: Path) -> frozenset[str]:
    """Return the names of the tensors that the index lists; none where there is no index."""
    if not (directory / INDEX).is_file():
        return frozenset()
    return frozenset(_weight_map(directory))


@contextmanager
def loadable_view(directory: Path) -> Iterator[Path]:
    """Yield a directory from which transformers loads the same weights as vLLM.

    It is ``directory`` itself if there are no other weights in it, and an index if there are
    several files. Otherwise it is a temporary directory of links.
    """
    loaded = weight_files(directory)
    names = {path.name for path in loaded}
    has_index = (directory / INDEX).is_file()
    if (has_index and not (directory / WEIGHTS).exists()) or names == {WEIGHTS}:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="fathom-view-") as name:
        view = Path(name)
        for path in directory.iterdir():
            if path.suffix != _SUFFIX and not path.name.endswith(f"{_SUFFIX}.index.json"):
                (view / path.name).symlink_to(path.resolve())
        _link_weights(view, loaded)
        yield view


def _link_weights(view: Path, loaded: list[Path]) -> None:
    if len(loaded) == 1:
        (view / WEIGHTS).symlink_to(loaded[0].resolve())
        return
    weight_map: dict[str, str] = {}
    for number, path in enumerate(loaded, start=1):
        # The names keep the order of the files, so the last of equal tensors is used here, too.
        shard = f"model-{number:05d}-of-{len(loaded):05d}{_SUFFIX}"
        (view / shard).symlink_to(path.resolve())
        weight_map |= dict.fromkeys(tensor_names(path), shard)
    (view / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _present(directory: Path) -> list[Path]:
    found = (path for path in directory.glob(f"*{_SUFFIX}") if not path.name.startswith("."))
    return sorted(found, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that puts model-2 before model-10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _named(directory: Path) -> set[str] | None:
    # vLLM takes neither a directory of that name nor a broken link for an index.
    return set(_weight_map(directory).values()) if (directory / INDEX).is_file() else None


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(f"{path}: weight_map: allowed: an object of file names")
    if not weight_map:
        refuse(path, "weight_map", weight_map, "the name of a file for each tensor")
    for shard in weight_map.values():
        if "/" in shard or "\0" in shard or not shard.endswith(_SUFFIX):
            refuse(path, "weight_map", shard, f"names of *{_SUFFIX} files beside the index")
    return weight_map
