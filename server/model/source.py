"""The source of the model: the demo model, a name, a directory or the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.checkpoint import read_config
from server.errors import InvalidArgument
from server.model import smollm2

DEMO_MODEL = Path(__file__).parent / "demo"
DEMO_MODEL_NAME = "fathom-demo"
_DEMO = "demo"

# Assumed where the configuration names no length.
_UNKNOWN_CONTEXT_TOKENS = 2**17
# Variables that name the directory of the Hub's client for downloads.
_CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
# Some repositories also hold weights in other formats, which are not loaded.
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.safetensors", "*.txt"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint directory, and the name that clients are told."""

    directory: Path
    name: str

    @property
    def title(self) -> str:
        """The name for readers: of a directory, its last part."""
        is_directory = Path(self.name).expanduser() == self.directory
        return self.directory.resolve().name if is_directory else self.name

    def max_context(self) -> int:
        """Return an upper bound of the context in tokens, from the checkpoint's configuration."""
        config = read_config(self.directory)
        text: dict[str, Any] = config.get("text_config") or config
        length = text.get("max_position_embeddings")
        if not isinstance(length, int):
            return _UNKNOWN_CONTEXT_TOKENS
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        factor = rope.get("factor") if isinstance(rope, dict) else None
        return int(length * max(1.0, factor)) if isinstance(factor, int | float) else length


def find_model(model: str | None, revision: str | None = None) -> ModelSource:
    """Return the model of the settings; one of the Hub is downloaded where it is not cached.

    ``demo`` and ``smollm2`` are names, unless a directory of that name holds a checkpoint.

    Raises:
        InvalidArgument: there is no such directory, and the Hub has no such model or cannot be
            reached.
    """
    if model is None:
        return ModelSource(DEMO_MODEL, DEMO_MODEL_NAME)
    allowed = "an existing directory or a Hugging Face Hub id"
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
        if model in (_DEMO, smollm2.NAME):
            is_directory = (path / "config.json").is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user names no user
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgument("model", model, f"{allowed} ({reason})") from error
    if is_directory:
        return ModelSource(path, model)
    if model == _DEMO:
        return ModelSource(DEMO_MODEL, DEMO_MODEL_NAME)
    if model == smollm2.NAME:
        return ModelSource(_made_smollm2(), model)
    if exists or not _HUB_ID.fullmatch(model):
        raise InvalidArgument("model", model, allowed)
    return ModelSource(_download(model, revision), model)


def _made_smollm2() -> Path:
    try:
        return smollm2.smollm2_checkpoint()
    except OSError as error:
        raise InvalidArgument(
            "model", smollm2.NAME, f"one that can be kept in the cache directory ({error})"
        ) from error


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except RevisionNotFoundError:
        raise InvalidArgument("revision", revision, f"a revision that {model} has") from None
    except Exception as error:  # the client and its transport raise many kinds
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        for name in _CACHE_VARIABLES:
            if value := os.environ.get(name):
                reason += f"; {name}={value}"
        raise InvalidArgument(
            "model", model, f"an existing directory, or a model of the Hub ({reason})"
        ) from error
