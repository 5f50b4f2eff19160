"""Writes a quantized checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pruning.checkpoint import check_checkpoint, read_config
from pruning.durable import write_file
from pruning.fingerprint import FileHash, file_sha256, model_fingerprint
from pruning.quantization import model_card
from pruning.quantization.errors import QuantizationError, QuantizationFailed
from pruning.quantization.linear_layers import fitting_settings, num_bytes_quantized
from pruning.quantization.provenance import QUANTIZATION_FILE, Provenance
from pruning.quantization.settings import QuantizationSettings, check_not_quantized
from pruning.quantization.worker_process import Request, Stop, gptqmodel_version, run_worker
from pruning.surgery.companions import copy_companions
from pruning.surgery.output_directory import check_replaceable, check_space, output_directory
from pruning.weights import INDEX, loadable_view, weight_bytes, weight_files

# Called with (layers done, all layers).
OnLayers = Callable[[int, int], None]

_CONFIG = "config.json"
_WRITTEN = frozenset({_CONFIG, QUANTIZATION_FILE, model_card.FILE_NAME})
_PACKAGES = ("gptqmodel", "torch", "transformers")
# Fields of GPTQModel's metadata that describe its method; the others describe the machine.
_META = frozenset(
    {"act_group_aware", "damp_auto_increment", "damp_percent", "mse", "quantizer"}
    | {"static_groups", "true_sequential"}
)


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantized checkpoint that was written; sizes are of the weights, in bytes."""

    directory: Path
    settings: QuantizationSettings
    fingerprint: str
    num_source_bytes: int
    num_bytes: int


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    settings: QuantizationSettings,
    windows: Sequence[Sequence[int]],
    *,
    text_fingerprint: str,
    base_model: str | None = None,
    overwrite: bool = False,
    with_code: bool = False,
    on_progress: OnLayers | None = None,
    stop: Stop | None = None,
    file_hash: FileHash = file_sha256,
) -> Quantized:
    """Write the model in ``source``, quantized with GPTQ, to the new directory ``out``.

    ``windows`` are the token ids to calibrate on; ``text_fingerprint`` is that of their texts.
    Quantization runs in a process of its own, on a GPU where there is one, layer by layer.
    Configuration, tokenizer and generation settings are those of the source. Python files are
    copied only ``with_code``, and code that comes with the model runs only then. ``base_model``
    is what the model card calls the source. ``on_progress`` is told the layers that are done
    and those to do. ``stop`` ends it from another thread. ``file_hash`` is that of
    :func:`pruning.fingerprint.model_fingerprint`.

    ``out`` appears when it is whole. ``overwrite`` replaces an earlier quantization then.

    Raises:
        CheckpointError: ``source`` is incomplete or damaged.
        QuantizationError: it cannot be quantized like this, or GPTQModel is not installed.
        QuantizationFailed: GPTQModel has failed, or its process was killed.
        SurgeryError: ``out`` may not be written, or the disk is full.
        OSError: reading or writing failed.
    """
    source, out = Path(source), absolute(out)
    settings = check_quantizable(source, settings)
    replaceable_with = QUANTIZATION_FILE if overwrite else None
    check_replaceable(out, replaceable_with)
    if source.resolve().is_relative_to(out.resolve()):
        raise QuantizationError(f"{out}: holds the model itself, allowed: another directory")
    check_space(out, num_bytes_needed(source, settings))
    with output_directory(out, replaceable_with=replaceable_with) as directory:
        quantize_into(
            directory,
            source,
            settings,
            windows,
            text_fingerprint=text_fingerprint,
            base_model=base_model or source.resolve().name,
            with_code=with_code,
            on_progress=on_progress,
            stop=stop,
            base_fingerprint=model_fingerprint(source, file_hash),
        )
    return Quantized(
        directory=out,
        settings=settings,
        fingerprint=model_fingerprint(out),
        num_source_bytes=weight_bytes(source),
        num_bytes=weight_bytes(out),
    )


def check_quantizable(source: Path, settings: QuantizationSettings) -> QuantizationSettings:
    """Return the settings with a group size.

    Raises the errors of :func:`fitting_settings`, and :class:`QuantizationError` for a quantized
    model and where GPTQModel is not installed.
    """
    check_not_quantized(source)
    gptqmodel_version()
    return fitting_settings(source, settings)


def num_bytes_needed(source: Path, settings: QuantizationSettings) -> int:
    """Estimate the disk space that quantization needs; the settings must fit the model."""
    # GPTQModel keeps the layers that are done on the disk, and writes them once more.
    return 2 * num_bytes_quantized(source, settings)


def quantize_into(
    directory: Path,
    source: Path,
    settings: QuantizationSettings,
    windows: Sequence[Sequence[int]],
    *,
    text_fingerprint: str,
    base_model: str,
    with_code: bool,
    on_progress: OnLayers | None,
    stop: Stop | None,
    base_fingerprint: str,
    pruned_from: int | None = None,
) -> None:
    """Write the quantized model into the directory, which is to be renamed once it is whole.

    ``settings`` have been checked. ``base_fingerprint`` is that of ``source``. ``pruned_from``:
    how many layers there were before pruning.
    """
    assert settings.group_size is not None
    provenance = Provenance(
        base_fingerprint=base_fingerprint,
        bits=settings.bits,
        group_size=settings.group_size,
        act_order=settings.act_order,
        text_fingerprint=text_fingerprint,
        num_tokens=sum(map(len, windows)),
        versions={name: metadata.version(name) for name in _PACKAGES},
    )
    # First what can be written at once: whatever is wrong with it is better known early.
    write_file(directory / QUANTIZATION_FILE, provenance.to_json())
    card = model_card.model_card(source, base_model, provenance, pruned_from)
    write_file(directory / model_card.FILE_NAME, card.encode())
    copy_companions(source, directory, written=_WRITTEN, with_code=with_code)
    work = directory / "quantizing"
    raw, scratch = work / "quantized", work / "scratch"
    scratch.mkdir(parents=True)
    with loadable_view(source.resolve()) as view:
        run_worker(
            Request(
                source=str(view),
                out=str(raw),
                scratch=str(scratch),
                bits=settings.bits,
                group_size=settings.group_size,
                act_order=settings.act_order,
                trust_remote_code=with_code,
                windows=windows,
            ),
            on_progress,
            stop,
        )
    _assemble(source, raw, directory, with_code=with_code)
    shutil.rmtree(work)
    check_checkpoint(directory)


def with_companions_of(
    source: str | Path,
    quantized: str | Path,
    out: str | Path,
    *,
    base_model: str,
    with_code: bool,
) -> None:
    """Write ``quantized``, made from the weights of ``source``, with the files beside these now.

    Weights are links to the same files where the file system has such, else copies. ``out`` is
    new, and appears when it is whole. Raises :class:`QuantizationError` where ``quantized`` says
    nothing of its provenance, and what :func:`quantize_checkpoint` does of ``out``.
    """
    source, quantized, out = Path(source), Path(quantized), absolute(out)
    provenance = Provenance.load(quantized)
    if provenance is None:
        raise QuantizationError(f"{quantized / QUANTIZATION_FILE}: missing")
    with output_directory(out) as directory:
        card = model_card.model_card(source, base_model, provenance)
        write_file(directory / model_card.FILE_NAME, card.encode())
        copy_companions(source, directory, written=_WRITTEN, with_code=with_code)
        for name in (_CONFIG, QUANTIZATION_FILE):
            write_file(directory / name, (quantized / name).read_bytes())
        for path in [*weight_files(quantized), *quantized.glob(INDEX)]:
            try:
                os.link(path, directory / path.name)
            except OSError:
                shutil.copyfile(path, directory / path.name)
        check_checkpoint(directory)


def absolute(out: str | Path) -> Path:
    """Return the path without following it, should it be a link itself."""
    path = Path(out)
    return path.parent.resolve() / path.name if path.name else path.resolve()


def _assemble(source: Path, raw: Path, directory: Path, *, with_code: bool) -> None:
    """Put the weights of ``raw`` and the configuration of ``source`` into ``directory``.

    GPTQModel adapts tokenizer, configuration and generation settings to its own needs; the
    model is to behave as it did.
    """
    check_checkpoint(raw)
    written = read_config(raw)
    config = _with_dtype(read_config(source), written.get("dtype") or written["torch_dtype"])
    config["quantization_config"] = _rules(written, raw)
    if not with_code:
        config.pop("auto_map", None)  # it would name files that are not there
    document = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    write_file(directory / _CONFIG, document)
    for path in [*weight_files(raw), *raw.glob(INDEX)]:
        path.rename(directory / path.name)
        with (directory / path.name).open("rb") as file:
            os.fsync(file.fileno())


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Set the data type of the weights that are not quantized."""
    found = False
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("dtype", "torch_dtype"):
            if name in section:
                section[name] = dtype
                found = True
    return config if found else {**config, "dtype": dtype}


def _rules(written: dict[str, Any], raw: Path) -> dict[str, Any]:
    rules: dict[str, Any] = dict(written["quantization_config"])
    rules["meta"] = {name: value for name, value in rules["meta"].items() if name in _META}
    if rules["desc_act"]:
        _check_groups_are_in_order(raw, rules["group_size"])
        rules["desc_act"] = False  # to a kernel it is as if it had never been
    return rules


def _check_groups_are_in_order(raw: Path, group_size: int) -> None:
    import numpy as np
    from safetensors import safe_open

    for path in weight_files(raw):
        with safe_open(path, framework="np") as tensors:
            for name in filter(_holds_groups, tensors.keys()):
                groups = tensors.get_tensor(name)
                columns = np.arange(len(groups))
                if not (groups == (0 if group_size == -1 else columns // group_size)).all():
                    raise QuantizationFailed(f"{name}: the groups are not in order")


def _holds_groups(name: str) -> bool:
    return name.endswith(".g_idx")
