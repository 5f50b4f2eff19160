"""Which files a model's weights are loaded from: those that vLLM loads, whoever asks.

vLLM reads every ``*.safetensors`` of the directory, or, where there is a
``model.safetensors.index.json``, those of them that the index names. No other index counts, and
of a file that is read, every tensor does, whatever the index says of it. Files are read in the
natural order of their names, so of a tensor that is in several of them, the last one stays.
transformers has other rules; :func:`loadable_view` shows it the same weights.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruning.checkpoint_file import CheckpointError, read_object, refuse

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"


def weight_files(directory: Path) -> list[Path]:
    """Return the files that are loaded, at least one, in the order in which they are.

    Raises :class:`CheckpointError` where there are none and where the index names others than
    there are.
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
    """Yield a directory from which transformers loads the weights that vLLM does.

    That is ``directory`` itself, unless it holds other weights besides or has no index of its
    shards: then it is a temporary one of links.
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
    from pruning.checkpoint import tensor_names

    if len(loaded) == 1:
        (view / WEIGHTS).symlink_to(loaded[0].resolve())
        return
    weight_map: dict[str, str] = {}
    for number, path in enumerate(loaded, start=1):
        # Names whose order is that of the files: the last of equal tensors stays here, too.
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
    # A directory of that name, or a link to nothing, is no index to vLLM.
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
