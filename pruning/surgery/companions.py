"""The files of a model beside its weights and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from pruning.durable import write_file
from pruning.fingerprint import files_fingerprint

_CONFIG = "config.json"
_WEIGHT_SUFFIXES = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}
)
_TEMPLATES = "additional_chat_templates"
# Tokenizers take some tens of megabytes; larger files are not copied.
_MAX_COPIED_BYTES = 256 << 20

logger = logging.getLogger(__name__)


def companion_files(source: Path, *, written: Collection[str], with_code: bool) -> Iterator[Path]:
    """Yield the files of ``source`` that a checkpoint made from it gets, too.

    They are tokenizer, templates, generation settings and the like, but neither the weights nor
    files that are ``written`` anew. Python files are among them only ``with_code``.
    """
    for path, problem in _candidates(source, written, with_code=with_code):
        if problem is None:
            yield path
        else:
            logger.warning("%s: left out, %s", path.name, problem)


def copy_companions(
    source: Path, directory: Path, *, written: Collection[str], with_code: bool
) -> None:
    """Write :func:`companion_files` to ``directory``; raises :class:`OSError`."""
    for path in companion_files(source, written=written, with_code=with_code):
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        write_file(target, path.read_bytes())


def companions_fingerprint(source: Path, *, with_code: bool) -> str:
    """Return ``"sha256:..."`` of all files that a checkpoint made from ``source`` gets from it.

    The model card is one of them: licence and languages are taken from it. Raises
    :class:`pruning.checkpoint.CheckpointError` for a file that cannot be read.
    """
    files = _candidates(source, {_CONFIG}, with_code=with_code)
    return files_fingerprint(
        (path.relative_to(source).as_posix(), path) for path, problem in files if problem is None
    )


def _candidates(
    source: Path, written: Collection[str], *, with_code: bool
) -> Iterator[tuple[Path, str | None]]:
    """Yield files, each with the reason why it is not copied."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == _TEMPLATES:
            templates = sorted(path.glob("*.jinja"))
            yield from ((template, None) for template in templates if template.is_file())
        if not path.is_file() or path.name.startswith(".") or path.name in written:
            continue
        if path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
            continue
        if path.suffix == ".py" and not with_code:
            yield path, "code is copied only where it is trusted"
        elif path.stat().st_size > _MAX_COPIED_BYTES:
            yield path, "too large for a part of a model"
        else:
            yield path, None
