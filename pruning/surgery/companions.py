"""The files of a model beside its weights and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

_WEIGHT_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}
)
_TEMPLATES = "additional_chat_templates"
# Tokenizers take some tens of megabytes; what is larger is no part of the model.
_MAX_COPIED_BYTES = 256 << 20

logger = logging.getLogger(__name__)


def companion_files(source: Path, *, written: Collection[str], with_code: bool) -> Iterator[Path]:
    """Yield what a checkpoint made from ``source`` is to have of its files.

    That is tokenizer, templates, generation settings and the like; not the weights, not what is
    ``written`` anew, and Python files only ``with_code``.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == _TEMPLATES:
            yield from sorted(path.glob("*.jinja"))
        if not path.is_file() or path.name.startswith(".") or path.name in written:
            continue
        if path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
            continue
        if path.suffix == ".py" and not with_code:
            logger.warning("%s: left out, code is copied only where it is trusted", path.name)
        elif path.stat().st_size > _MAX_COPIED_BYTES:
            logger.warning("%s: left out, too large for a part of a model", path.name)
        else:
            yield path
