"""Writes a standalone checkpoint of one depth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.checkpoint import CheckpointError, check_checkpoint, read_config
from pruning.checkpoint_file import read_object
from pruning.collapse import CollapsedModel
from pruning.depths import check_depth
from pruning.durable import write_file
from pruning.fingerprint import FileHash, file_sha256, model_fingerprint
from pruning.plan import Plan
from pruning.repair.errors import RepairError
from pruning.repair.folding import FoldedRepair, check_foldable, gaps
from pruning.surgery import model_card
from pruning.surgery.companions import companion_files
from pruning.surgery.errors import SurgeryError
from pruning.surgery.folding import folding_changes
from pruning.surgery.layer_map import LayerMap
from pruning.surgery.merging import merging_changes
from pruning.surgery.model_config import cut_config, embeddings_are_tied, num_layers_of
from pruning.surgery.module_rules import renumber_rules
from pruning.surgery.output_directory import check_replaceable, check_space, output_directory
from pruning.surgery.shard import Change, NewShard, Shard
from pruning.surgery.tensor_names import TensorNames
from pruning.weights import INDEX, WEIGHTS, indexed_tensors, stray_weight_files, weight_files

PLAN_FILE = "fathom_plan.json"

_CONFIG = "config.json"
# Files that quantizers write beside the configuration.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
_WRITTEN = frozenset({_CONFIG, *_QUANTIZATION_FILES, model_card.FILE_NAME, PLAN_FILE})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Export:
    """The checkpoint that was written; sizes are of the weights, in bytes."""

    directory: Path
    num_layers: int
    depth: int
    removed: tuple[int, ...]
    num_source_bytes: int
    num_bytes: int


def count_layers(directory: str | Path) -> int:
    """Return the number of layers of the model in ``directory``.

    Raises :class:`pruning.checkpoint.CheckpointError` if its configuration does not say.
    """
    return num_layers_of(read_config(Path(directory)))


def check_output(out: str | Path, *, overwrite: bool = False) -> None:
    """Raise :class:`SurgeryError` where an export may not be written to ``out``."""
    check_replaceable(_absolute(out), PLAN_FILE if overwrite else None)


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    plan: Plan,
    depth: int,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    with_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    file_hash: FileHash = file_sha256,
    repair: FoldedRepair | None = None,
    collapse: CollapsedModel | None = None,
) -> Export:
    """Write the model in ``source`` with ``depth`` of its layers to the new directory ``out``.

    The layers that ``plan`` leaves out at that depth are gone, the others numbered anew. Weights
    are copied byte by byte in constant memory, whatever their type, into as many shards as they
    come in; torch is not used for it. Tokenizer and generation settings are copied, Python files
    only ``with_code``. ``base_model`` is what the model card calls the source, by default its
    directory. ``on_progress`` is told the bytes written and those to write. ``file_hash`` is that
    of :func:`pruning.fingerprint.model_fingerprint`. ``repair`` is folded into the weights, for
    which torch is used; its removed layers must be those of the plan at that depth. Likewise,
    ``collapse`` says which layers take up the removed ones; it and ``repair`` exclude each other.

    ``out`` appears when it is whole. ``overwrite`` replaces an earlier export then.

    Raises:
        CheckpointError: ``source`` is incomplete or damaged.
        SurgeryError: ``source`` cannot be cut, ``out`` may not be written, or the disk is full.
        PlanError: ``plan`` is of another model.
        RepairError: ``repair`` cannot be folded into the weights, or is for other layers.
        ValueError: ``depth`` is not in 1..L.
        OSError: reading or writing failed.
    """
    source, out = Path(source), _absolute(out)
    fingerprint = model_fingerprint(source, file_hash)
    config = read_config(source)
    num_layers = num_layers_of(config)
    plan.check_model(fingerprint, num_layers)
    check_depth(num_layers, depth)
    check_output(out, overwrite=overwrite)
    if source.resolve().is_relative_to(out.resolve()):
        raise SurgeryError(f"{out}: holds the model itself, allowed: another directory")

    layers = LayerMap(num_layers, plan.skipped(depth))
    shards = _shards(source)
    tensors = {tensor.name for shard in shards for tensor in shard.tensors}
    names = TensorNames.of(tensors, num_layers, tied=embeddings_are_tied(config))
    changes: dict[str, Change] = {}
    if repair is not None:
        if {*gaps(layers.removed)} != {fold.removed for fold in repair.folds}:
            raise RepairError(
                f"repair: is for the gaps {[fold.removed for fold in repair.folds]}, allowed: "
                f"{gaps(layers.removed)}, those of depth {depth}"
            )
        check_foldable(config)
        everything = [tensor for shard in shards for tensor in shard.tensors]
        changes = folding_changes(everything, names.container, repair)
    if collapse is not None:
        if repair is not None:
            raise ValueError("repair: got one with collapse, allowed: one of the two")
        if collapse.collapse.removed != layers.removed:
            raise SurgeryError(
                f"collapse: is for the layers {list(collapse.collapse.removed)}, allowed: "
                f"{list(layers.removed)}, those of depth {depth}"
            )
        changes = merging_changes(shards, names.container, collapse.collapse)
    weights = _new_shards(shards, names, layers, changes)
    documents = _documents(source, config, names, layers, with_code=with_code)
    if WEIGHTS not in weights:
        documents[INDEX] = _index(weights)
    card = model_card.model_card(
        source, base_model or source.resolve().name, plan, layers, repair, collapse
    )
    documents[model_card.FILE_NAME] = card.encode()
    copies = list(companion_files(source, written=_WRITTEN, with_code=with_code))

    num_bytes = sum(shard.num_bytes for shard in weights.values())
    num_other_bytes = sum(map(len, documents.values())) + sum(
        path.stat().st_size for path in copies
    )
    check_space(out, num_bytes + num_other_bytes)
    done = 0

    def count(num_written: int) -> None:
        nonlocal done
        done += num_written
        if on_progress is not None:
            on_progress(done, num_bytes)

    with output_directory(out, replaceable_with=PLAN_FILE if overwrite else None) as directory:
        for name, document in documents.items():
            write_file(directory / name, document)
        for path in copies:
            target = directory / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            write_file(target, path.read_bytes())
        plan.save(directory / PLAN_FILE)
        for name, shard in weights.items():
            shard.write(directory / name, count)
        check_checkpoint(directory)
    return Export(
        directory=out,
        num_layers=num_layers,
        depth=depth,
        removed=layers.removed,
        num_source_bytes=sum(shard.path.stat().st_size for shard in shards),
        num_bytes=num_bytes,
    )


def _absolute(out: str | Path) -> Path:
    path = Path(out)
    return path.parent.resolve() / path.name if path.name else path.resolve()


def _shards(source: Path) -> list[Shard]:
    """Read the headers of the files that vLLM loads, without tensors that a later file replaces."""
    if strays := [path.name for path in stray_weight_files(source)]:
        logger.warning("%s: left out, %s does not name it", ", ".join(strays), INDEX)
    shards: list[Shard] = []
    seen: dict[str, Path] = {}
    for path in reversed(weight_files(source)):
        shard = Shard.read(path)
        twice = [tensor.name for tensor in shard.tensors if tensor.name in seen]
        if twice:
            logger.warning(
                "%s: %s is left out, with %d more: %s has it, too, and is loaded later",
                path.name,
                twice[0],
                len(twice) - 1,
                seen[twice[0]].name,
            )
        shards.append(shard.without(twice))
        seen |= dict.fromkeys((tensor.name for tensor in shard.tensors), path)
    if missing := indexed_tensors(source) - seen.keys():
        raise CheckpointError(f"{source / INDEX}: {min(missing)}: no shard has it")
    return shards[::-1]


def _new_shards(
    shards: list[Shard], names: TensorNames, layers: LayerMap, changes: Mapping[str, Change]
) -> dict[str, NewShard]:
    new_shards = []
    for shard in shards:
        renamed = [(names.renamed(tensor.name, layers), tensor) for tensor in shard.tensors]
        if kept := [(name, tensor) for name, tensor in renamed if name is not None]:
            new_shards.append(NewShard(shard, kept, changes))
    if len(new_shards) == 1:
        return {WEIGHTS: new_shards[0]}
    return {
        f"model-{number:05d}-of-{len(new_shards):05d}.safetensors": shard
        for number, shard in enumerate(new_shards, start=1)
    }


def _index(weights: dict[str, NewShard]) -> bytes:
    total_size = sum(shard.num_tensor_bytes for shard in weights.values())
    weight_map = {name: file for file, shard in weights.items() for name in shard.names}
    return _json({"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _documents(
    source: Path, config: dict[str, Any], names: TensorNames, layers: LayerMap, *, with_code: bool
) -> dict[str, bytes]:
    """Return the files that describe the layers, by name."""
    new_config = cut_config(config, layers)
    for section in (new_config, *(v for v in new_config.values() if isinstance(v, dict))):
        if (rules := section.get("quantization_config")) is not None:
            section["quantization_config"] = renumber_rules(rules, names.list_name, layers)
    if not with_code:
        new_config.pop("auto_map", None)  # it would name files that are not there
    documents = {_CONFIG: _json(new_config)}
    for name in _QUANTIZATION_FILES:
        if (source / name).is_file():
            rules = read_object(source / name)
            documents[name] = _json(renumber_rules(rules, names.list_name, layers))
    return documents


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
