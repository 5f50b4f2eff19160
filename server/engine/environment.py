"""Variables of vLLM and its libraries that name directories."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from server.errors import InvalidArgument

# Written to while an engine starts; a library would fail in the middle of it.
_WRITTEN = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH")
_SOCKETS = "VLLM_RPC_BASE_PATH"
# The path of a Unix socket has 107 bytes at most; vLLM appends a name of 37 to its directory.
_MAX_SOCKET_DIRECTORY_BYTES = 107 - 37
_SHORT_DIRECTORY = "/tmp"


def check_directories() -> None:
    """Raise :class:`InvalidArgument`, naming the variable, for a directory of no use."""
    for name in _WRITTEN:
        value = os.environ.get(name)
        if value and not _can_be_written(Path(value)):
            raise InvalidArgument(name, value, "a directory that can be written, or none at all")
    sockets = os.environ.get(_SOCKETS)
    if sockets and not Path(sockets).is_dir():
        raise InvalidArgument(_SOCKETS, sockets, "an existing directory")
    if sockets and len(os.fsencode(sockets)) > _MAX_SOCKET_DIRECTORY_BYTES:
        allowed = f"{_MAX_SOCKET_DIRECTORY_BYTES} bytes or fewer: sockets are made in it"
        raise InvalidArgument(_SOCKETS, sockets, allowed)


def shorten_socket_directory() -> None:
    """Have vLLM make its sockets elsewhere where the name of the temporary directory is too long.

    Raises :class:`InvalidArgument` where there is no temporary directory.
    """
    try:
        directory = tempfile.gettempdir()
    except OSError as error:
        value = os.environ.get("TMPDIR")
        raise InvalidArgument(
            "TMPDIR", value, f"a directory that can be written ({error})"
        ) from None
    if len(os.fsencode(directory)) > _MAX_SOCKET_DIRECTORY_BYTES:
        os.environ.setdefault(_SOCKETS, _SHORT_DIRECTORY)


def _can_be_written(directory: Path) -> bool:
    """Return whether files can be made in a directory that is there or can be made."""
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            return True
    except OSError:
        return False
