"""Which quantized checkpoints vLLM can load, known from their configuration.

vLLM finds most of it only while it builds the model, in another process, and some of it after
all of the weights have been read.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pruning.checkpoint import CheckpointError, read_config, tensor_names, weight_files
from pruning.checkpoint_file import read_object
from server.engine.elastic.compatibility import is_for_cpu, packed_weights_problem
from server.errors import InvalidArgument

_SECTIONS = ("quantization_config", "compression_config")
# Files in which older tools describe how a checkpoint is quantized.
_OLD_FILES = ("quantize_config.json", "quant_config.json")
_GROUP_SIZES = (-1, 32, 64, 128)
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_SMALL_FLOATS = "auto, bfloat16 or float16 with quantized weights, whose kernels know no float32"


def check_loadable(directory: Path, dtype: str, engine_args: Mapping[str, Any]) -> None:
    """Raise where vLLM on this machine cannot load the quantized weights in ``directory``.

    Nothing is said of weights that are not quantized. Of methods other than GPTQ and AWQ, only a
    configuration that is not well-formed is refused, and weights packed in 4 bits where vLLM has
    no kernel for them.

    Raises:
        CheckpointError: It cannot; the message names the file, the field and what is allowed.
        InvalidArgument: It cannot with this ``dtype``.
    """
    tensors = set[str]().union(*map(tensor_names, weight_files(directory)))
    is_packed = any(name.endswith(".qweight") for name in tensors)
    path, rules = _rules(directory, with_old_files="quantization" in engine_args)
    if rules is None:
        if is_packed:
            _refuse_old_layout(directory)
        return
    method = rules.get("quant_method")
    if method is None and path.name in _OLD_FILES:
        method = engine_args["quantization"]
    if not isinstance(method, str):
        _refuse(path, "quant_method", method, "the name of a method, such as gptq or awq")
    if method not in ("gptq", "awq"):
        if _packs_integers(rules) and (reason := packed_weights_problem()):
            _refuse(path, "quant_method", method, f"none with packed integers: {reason}")
        return
    if not is_packed:
        raise CheckpointError(
            f"{directory}: none of its tensors is packed (*.qweight), though {path.name} says "
            f"that it is quantized with {method}"
        )
    if method == "gptq":
        _check_gptq(path, rules)
    else:
        _check_awq(path, rules)
    if dtype == "float32":
        raise InvalidArgument("dtype", dtype, _SMALL_FLOATS)
    if reason := packed_weights_problem() or experts_problem(tensors):
        _refuse(path, "quant_method", method, f"none: {reason}")


def serving_problem(bits: int, tensors: set[str]) -> str | None:
    """Return why a model of these tensors, quantized with GPTQ, cannot be served on this machine.

    None where it can be.
    """
    if bits != 4 and is_for_cpu():
        return f"vLLM has its kernel for weights of {bits} bits for GPUs alone"
    return packed_weights_problem() or experts_problem(tensors)


def experts_problem(tensors: set[str]) -> str | None:
    """Return why a model of these tensors cannot run quantized here, None where it can."""
    if not any(".experts." in name for name in tensors) or not is_for_cpu():
        return None
    import torch

    if torch.cpu._is_amx_tile_supported():
        return None
    return (
        "this is a mixture of experts, and vLLM's kernels for quantized experts need a GPU, or a "
        "CPU with AMX"
    )


def _packs_integers(rules: Mapping[str, Any]) -> bool:
    """Return whether a configuration of compressed-tensors has weights for the kernel of GPTQ."""
    groups = rules.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    sections = (rules, *(group for group in values if isinstance(group, dict)))
    return any(section.get("format") == "pack-quantized" for section in sections)


def _rules(directory: Path, *, with_old_files: bool) -> tuple[Path, dict[str, Any] | None]:
    """Return how the checkpoint is quantized, and the file that says so."""
    path = directory / "config.json"
    config = read_config(directory)
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        for name in _SECTIONS:
            if (rules := section.get(name)) is not None:
                if not isinstance(rules, dict):
                    raise CheckpointError(
                        f"{path}: {name}: found {reprlib.repr(rules)}, allowed: an object"
                    )
                return path, rules
    for name in _OLD_FILES if with_old_files else ():
        if (directory / name).is_file():
            return directory / name, read_object(directory / name)
    return path, None


def _refuse_old_layout(directory: Path) -> NoReturn:
    old = next((name for name in _OLD_FILES if (directory / name).is_file()), None)
    if old is not None:
        allowed = f'the content of {old} with a "quant_method", such as "gptq"'
    else:
        allowed = "how the weights, which are packed (*.qweight), were quantized"
    raise CheckpointError(
        f"{directory / 'config.json'}: quantization_config: found nothing, allowed: {allowed}"
    )


def _check_gptq(path: Path, rules: Mapping[str, Any]) -> None:
    form = rules.get("checkpoint_format")
    if form is not None and form not in _GPTQ_FORMATS:
        _refuse(path, "checkpoint_format", form, ", ".join(_GPTQ_FORMATS))
    for name in ("bits", "group_size", "desc_act", "sym"):
        if name not in rules:
            _refuse_missing(path, name)
    _check_gptq_values(path, "", rules)
    for pattern, changes in _dynamic(path, rules):
        if not pattern.startswith("-:"):
            _check_gptq_values(path, f"dynamic.{pattern}.", {**rules, **changes})


def _dynamic(path: Path, rules: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    dynamic = rules.get("dynamic")
    if dynamic is None:
        return
    if not isinstance(dynamic, dict):
        _refuse(path, "dynamic", dynamic, "an object of rules")
    for pattern, changes in dynamic.items():
        if not isinstance(changes, dict):
            _refuse(path, f"dynamic.{pattern}", changes, "an object")
        yield pattern, changes


def _check_gptq_values(path: Path, prefix: str, rules: Mapping[str, Any]) -> None:
    bits = rules["bits"]
    allowed = "4 on a CPU: vLLM has kernels of other bits for GPUs alone"
    on_cpu = is_for_cpu()
    if type(bits) is not int or bits not in ((4,) if on_cpu else (4, 8)):
        _refuse(path, f"{prefix}bits", bits, allowed if on_cpu else "4, 8")
    group_size = _check_group_size(path, f"{prefix}group_size", rules["group_size"])
    for name in ("desc_act", "sym"):
        if not isinstance(rules[name], bool):
            _refuse(path, f"{prefix}{name}", rules[name], "true or false")
    if not rules["sym"]:
        _refuse(path, f"{prefix}sym", False, "true: vLLM's kernels know no zero points of GPTQ")
    if rules["desc_act"] and group_size != -1:
        _refuse(
            path,
            f"{prefix}desc_act",
            True,
            "false, or a group_size of -1: vLLM has no kernels for groups in the order of "
            "activations any more",
        )


def _check_awq(path: Path, rules: Mapping[str, Any]) -> None:
    names = {}
    for field, old in (("bits", "w_bit"), ("group_size", "q_group_size")):
        names[field] = old if old in rules else field
        if names[field] not in rules:
            _refuse_missing(path, field)
    if "zero_point" not in rules:
        _refuse_missing(path, "zero_point")
    bits = rules[names["bits"]]
    if type(bits) is not int or bits != 4:
        _refuse(path, names["bits"], bits, "4")
    _check_group_size(path, names["group_size"], rules[names["group_size"]])
    if not isinstance(rules["zero_point"], bool):
        _refuse(path, "zero_point", rules["zero_point"], "true or false")
    version = rules.get("version")
    if version is not None and (not isinstance(version, str) or version.lower() != "gemm"):
        _refuse(path, "version", version, "gemm: vLLM reads no other layout")


def _check_group_size(path: Path, field: str, size: object) -> int:
    if type(size) is not int or size not in _GROUP_SIZES:
        _refuse(path, field, size, ", ".join(map(str, _GROUP_SIZES)))
    return size


def _refuse_missing(path: Path, field: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {_field(path, field)}: found nothing, allowed: a value, which vLLM needs"
    )


def _refuse(path: Path, field: str, found: object, allowed: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {_field(path, field)}: found {reprlib.repr(found)}, allowed: {allowed}"
    )


def _field(path: Path, field: str) -> str:
    return field if path.name in _OLD_FILES else f"quantization_config.{field}"
