"""The quantized model: made once from the served model, and kept in the state directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pruning.checkpoint import read_config, tensor_names, weight_files
from pruning.fingerprint import file_sha256, text_fingerprint, token_fingerprint
from pruning.quantization import (
    GroupSizeError,
    QuantizationSettings,
    Stop,
    check_not_quantized,
    fitting_settings,
    gptqmodel_version,
    quantize_checkpoint,
    with_companions_of,
)
from pruning.surgery.companions import companions_fingerprint
from pruning.transformers_model import load_tokenizer
from server.calibration.text_windows import WINDOW, text_windows
from server.config import Settings
from server.engine.quantized_checkpoint import serving_problem
from server.errors import InvalidArgument
from server.file_hashes import FileHashes
from server.model.source import ModelSource
from server.state import EntryFormat, JsonEntry, StateDirectory, StateError
from server.state_keys import Key, quantized_key, with_companions

# Called with (layers done, all layers).
OnLayers = Callable[[int, int], None]

_KIND = "quantized"
_BITS = {"gptq-4bit": 4, "gptq-8bit": 8}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and hash of a file at the time it was written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Fingerprint and files of a kept checkpoint at the time it was written."""

    fingerprint: str
    files: dict[str, FileRecord]


def warn_if_not_served_here(quantization: QuantizationSettings, directory: Path) -> None:
    """Log a warning if this machine cannot serve what is about to be quantized for another one."""
    tensors = set[str]().union(*map(tensor_names, weight_files(directory)))
    if problem := serving_problem(quantization.bits, tensors):
        logger.warning(
            "a server on this machine will not be able to serve the quantized model: %s", problem
        )


class QuantizedModel:
    """A model quantized as the settings say, in a directory named after all that it depends on."""

    def __init__(
        self,
        settings: Settings,
        source: ModelSource,
        fingerprint: str,
        texts: Sequence[str],
        quantization: QuantizationSettings,
    ) -> None:
        """Prepare to quantize ``source`` with what :func:`checked_quantization` has returned.

        Raises :class:`pruning.text.TextError` where ``texts`` have no tokens, and
        :class:`pruning.checkpoint.CheckpointError` for a tokenizer that cannot be loaded and for
        a file beside the weights that cannot be read.
        """
        self._settings = settings
        self._source = source
        self._quantization = quantization
        self._text_fingerprint = text_fingerprint(texts)
        self._windows = calibration_windows(settings, source.directory, texts)
        with_code = settings.trust_remote_code
        self._weights_key = quantized_key(
            model=fingerprint,
            bits=quantization.bits,
            group_size=quantization.group_size,
            act_order=quantization.act_order,
            tokens=token_fingerprint(self._windows),
            gptqmodel=gptqmodel_version(),
            with_code=with_code,
        )
        companions = companions_fingerprint(source.directory, with_code=with_code)
        self._key = with_companions(self._weights_key, companions)
        # Waiting for another server that quantizes the same model saves hours, so there is no time
        # limit. If that server dies, its lock is released.
        self._state = StateDirectory(settings.state_dir, lock_seconds=math.inf)
        self._entry = _CheckpointEntry(self._key)

    @property
    def directory(self) -> Path:
        """The checkpoint, once :meth:`prepare` has been called."""
        return _directory_of(self._state.path_of(_KIND, self._key))

    def kept_fingerprint(self) -> str | None:
        """Return the fingerprint in the checkpoint's record; the checkpoint itself is not read."""
        try:
            return self._entry.record(self._state.path_of(_KIND, self._key)).fingerprint
        except (OSError, ValueError):
            return None

    async def prepare(self, on_progress: OnLayers) -> str:
        """Make the checkpoint unless it is kept; return its fingerprint.

        Raises what :func:`pruning.quantization.quantize_checkpoint` does.
        """

        async def make() -> CheckpointRecord:
            stop = Stop()
            making = asyncio.ensure_future(asyncio.to_thread(self._make, on_progress, stop))
            try:
                return await asyncio.shield(making)
            except asyncio.CancelledError:
                stop()
                with contextlib.suppress(Exception):
                    await making
                raise

        record = await self._state.load_or_make(_KIND, self._key, self._entry, make)
        return record.fingerprint

    def _make(self, on_progress: OnLayers, stop: Stop) -> CheckpointRecord:
        out = self.directory
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():  # it has no record, or is not what its record says
            shutil.rmtree(out)
        kept = self._kept_with_other_companions()
        if kept is not None:
            directory, fingerprint = kept
            with_companions_of(
                self._source.directory,
                directory,
                out,
                base_model=self._source.name,
                with_code=self._settings.trust_remote_code,
            )
            logger.info("Quantized before, with other files beside the weights: %s", directory)
            return CheckpointRecord(fingerprint, _files(out))
        written = quantize_checkpoint(
            self._source.directory,
            out,
            self._quantization,
            self._windows,
            text_fingerprint=self._text_fingerprint,
            base_model=self._source.name,
            with_code=self._settings.trust_remote_code,
            on_progress=on_progress,
            stop=stop,
            file_hash=FileHashes(self._settings.state_dir),
        )
        logger.info(
            "Quantized: %.1f MB, before: %.1f MB; kept in %s",
            written.num_bytes / 1e6,
            written.num_source_bytes / 1e6,
            out,
        )
        return CheckpointRecord(written.fingerprint, _files(out))

    def _kept_with_other_companions(self) -> tuple[Path, str] | None:
        """Return a kept checkpoint of the same weights, and its fingerprint.

        The model had another tokenizer, templates or generation settings when it was made.
        """
        for path in sorted(self._settings.state_dir.glob(f"{_KIND}-*.json")):
            try:
                key: Key = json.loads(path.read_bytes())["key"]
                if with_companions(self._weights_key, str(key["companions"])) != key:
                    continue
                record = _CheckpointEntry(key).load(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError):
                continue  # a start that needs this checkpoint reports it
            return _directory_of(path), record.fingerprint
        return None


class _CheckpointEntry(EntryFormat[CheckpointRecord]):
    """The record of a checkpoint; the checkpoint itself is in a directory beside it.

    The record is written last. Loading it reads the whole checkpoint, to compare it with the
    record; that takes less time than the engine takes to load the model.
    """

    def __init__(self, key: Key) -> None:
        self._json: JsonEntry[CheckpointRecord] = JsonEntry(CheckpointRecord, key)

    def record(self, path: Path) -> CheckpointRecord:
        return self._json.load(path)

    def load(self, path: Path) -> CheckpointRecord:
        record = self.record(path)
        directory = _directory_of(path)
        if not directory.is_dir():
            raise StateError(f"{directory.name}: the checkpoint is missing")
        found = _files(directory)
        for name in sorted(found.keys() | record.files.keys()):
            if found.get(name) != record.files.get(name):
                raise StateError(f"{directory.name}/{name}: not what was written")
        return record

    def save(self, value: CheckpointRecord, path: Path) -> None:
        self._json.save(value, path)


def checked_quantization(settings: Settings, directory: Path) -> QuantizationSettings | None:
    """Return how the model in ``directory`` is to be quantized; None: not at all.

    Reads no weights, only their headers. Raises :class:`InvalidArgument`, naming the setting, if
    the model cannot be quantized in this way, and the errors of
    :func:`pruning.quantization.fitting_settings` if it cannot be quantized at all.
    """
    wanted = quantization_settings(settings)
    if wanted is None:
        return None
    check_not_quantized(directory)
    gptqmodel_version()
    try:
        return fitting_settings(directory, wanted)
    except GroupSizeError as error:
        raise InvalidArgument("quantize_group_size", error.group_size, error.allowed) from error


def quantization_settings(settings: Settings) -> QuantizationSettings | None:
    """Return the settings of quantization, None where there is to be none."""
    if settings.quantize is None:
        return None
    return QuantizationSettings(
        bits=_BITS[settings.quantize],
        group_size=settings.quantize_group_size,
        act_order=settings.quantize_act_order,
    )


def calibration_windows(
    settings: Settings, directory: Path, texts: Sequence[str]
) -> list[list[int]]:
    """Cut the calibration texts into windows as for Block Influence, without an engine.

    Raises :class:`pruning.text.TextError` where they have no tokens, or one that the model does
    not know, and :class:`pruning.checkpoint.CheckpointError` for a tokenizer that cannot be loaded.
    """
    tokenizer = load_tokenizer(directory, trust=settings.trust_remote_code)

    def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
        # Quiet, for a text longer than the context is cut into windows.
        return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)

    return text_windows(
        tokenize,
        texts,
        max_context=max_context(settings, directory),
        max_tokens=settings.calibration_tokens,
        vocab_size=_vocab_size(directory),
    )


def _vocab_size(directory: Path) -> int:
    """Return the size of the vocabulary; a very large number if the configuration names none."""
    return next((size for size in _numbers(directory, "vocab_size") if size > 0), sys.maxsize)


def max_context(settings: Settings, directory: Path) -> int:
    """Return the length of the longest window plus one, or the model's context if it is shorter."""
    known = [limit for limit in _numbers(directory, "max_position_embeddings") if limit > 1]
    return min([WINDOW + 1, *known[:1], *filter(None, [settings.max_context])])


def _numbers(directory: Path, field: str) -> Iterator[int]:
    """Yield the numbers that the configuration and then its sections have in ``field``."""
    config = read_config(directory)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        value = section.get(field)
        if isinstance(value, int):
            yield value


def _directory_of(record: Path) -> Path:
    return record.with_suffix("")


def _files(directory: Path) -> dict[str, FileRecord]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=4) as pool:
        records = pool.map(_record_of, paths)
        return {
            path.relative_to(directory).as_posix(): record
            for path, record in zip(paths, records, strict=True)
        }


def _record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_sha256(path))
