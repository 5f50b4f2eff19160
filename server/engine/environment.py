"""Variables of vLLM and its libraries that name directories."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from server.errors import InvalidArgument

# Written to while an engine starts; a library would fail in the middle of it.
_WRITTEN = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH")
_SOCKETS = "VLLM_RPC_BASE_PATH"
# The path of a Unix socket has 107 bytes at most. vLLM appends a name of 37 to its directory,
# multiprocessing one of 32 to that of temporary files.
_MAX_SOCKET_DIRECTORY_BYTES = 107 - 37


def check_directories() -> None:
    """Raise :class:`InvalidArgument`, naming the variable, for a directory of no use."""
    for name in _WRITTEN:
        value = os.environ.get(name)
        if value and not _can_be_written(Path(value)):
            raise InvalidArgument(name, value, "a directory that can be written, or none at all")
    sockets = os.environ.get(_SOCKETS)
    if sockets and not Path(sockets).is_dir():
        raise InvalidArgument(_SOCKETS, sockets, "an existing directory")
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        allowed = f"a directory that can be written ({error})"
        raise InvalidArgument("TMPDIR", os.environ.get("TMPDIR"), allowed) from None
    for name, value in (("TMPDIR", temporary), (_SOCKETS, sockets)):
        if value and len(os.fsencode(value)) > _MAX_SOCKET_DIRECTORY_BYTES:
            allowed = f"{_MAX_SOCKET_DIRECTORY_BYTES} bytes or fewer: sockets are made in it"
            raise InvalidArgument(name, value, allowed)


def _can_be_written(directory: Path) -> bool:
    """Return whether files can be made in a directory that is there or can be made."""
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            return True
    except OSError:
        return False
