"""Where the model comes from: the demo model, a name, a directory or the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from server.errors import InvalidArgument
from server.model import smollm2

DEMO_MODEL = Path(__file__).parent / "demo"
DEMO_MODEL_NAME = "fathom-demo"

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
# Weights in other formats, which some repositories hold beside these, are not loaded.
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.safetensors", "*.txt"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint directory, and the name that clients are told."""

    directory: Path
    name: str


def find_model(model: str | None, revision: str | None = None) -> ModelSource:
    """Return the model of the settings; one of the Hub is downloaded where it is not cached.

    A directory comes before a name: ``smollm2`` is the one of that name where there is one.

    Raises:
        InvalidArgument: there is no such directory, and no such model on the Hub or no way
            to it.
    """
    if model is None:
        return ModelSource(DEMO_MODEL, DEMO_MODEL_NAME)
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(path, model)
    if model == smollm2.NAME:
        return ModelSource(_made_smollm2(), model)
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise InvalidArgument("model", model, "an existing directory or a Hugging Face Hub id")
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
    except (OSError, ValueError) as error:  # what the client and its transport raise
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgument(
            "model", model, f"an existing directory, or a model of the Hub ({reason})"
        ) from error
