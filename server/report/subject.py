"""The model that a report is about, and what it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.checkpoint import CheckpointError, check_checkpoint, read_config
from pruning.fingerprint import model_fingerprint, text_fingerprint, tokenizer_fingerprint
from pruning.surgery import SurgeryError, count_layers
from pruning.text import TextError
from server.config import Settings
from server.engine.arguments import cpu_dtype
from server.engine.elastic.architectures import UnsupportedArchitecture, elastic_architecture
from server.file_hashes import FileHashes
from server.model.inputs import calibration_texts, held_out_texts, refused_as
from server.model.source import ModelSource, find_model


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in a directory, with its texts.

    ``dtype`` is that in which it is measured. ``not_elastic`` is why the elastic engine does not
    run it, empty where it does.
    """

    source: ModelSource
    fingerprint: str
    tokenizer: str
    num_layers: int
    architecture: str
    dtype: str
    not_elastic: str
    texts: Sequence[str]
    held_out_texts: Sequence[str]

    @property
    def directory(self) -> Path:
        return self.source.directory

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.source.title,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "dtype": self.dtype,
            "calibration_text": text_fingerprint(self.texts),
            "held_out_text": text_fingerprint(self.held_out_texts),
        }


def find_subject(settings: Settings) -> Subject:
    """Return the model that the settings name.

    Raises :class:`StartError`, which names the setting, for what cannot be measured.
    """
    with refused_as("model", CheckpointError, SurgeryError):
        source = find_model(settings.model, settings.revision)
        directory = source.directory
        check_checkpoint(directory)
        config = read_config(directory)
        num_layers = count_layers(directory)
        fingerprint = model_fingerprint(directory, FileHashes(settings.state_dir))
        tokenizer = tokenizer_fingerprint(directory)
    architectures = config.get("architectures") or []
    not_elastic = ""
    try:
        elastic_architecture(architectures)
    except UnsupportedArchitecture as error:
        not_elastic = str(error)
    with refused_as("calibration", TextError):
        texts = calibration_texts(settings, directory)
    with refused_as("quality_text", TextError):
        measured_on = held_out_texts(settings)
    return Subject(
        source=source,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        num_layers=num_layers,
        architecture=", ".join(architectures) or "none",
        dtype=_dtype(settings, quantized="quantization_config" in config),
        not_elastic=not_elastic,
        texts=texts,
        held_out_texts=measured_on,
    )


def _dtype(settings: Settings, *, quantized: bool) -> str:
    import torch

    if torch.cuda.is_available():
        return settings.dtype
    return cpu_dtype(settings.dtype, quantized=quantized)
