"""An output directory that appears only when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pruning.durable import sync_directory
from pruning.surgery.errors import SurgeryError

_GIB = 1 << 30


@contextmanager
def output_directory(path: Path, *, replaceable_with: str | None = None) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that is renamed to it at the end.

    The directory is locked while it is written, and removed on any error. An unlocked one was left
    by a process that was killed: the next call for the same ``path`` removes it.
    ``replaceable_with`` is the name of a file; an existing directory that holds it is replaced,
    with two renames. If the process is killed between them, the next call moves the old directory
    back.

    Raises :class:`SurgeryError` where ``path`` may not be written, and while another process
    writes it.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    aside = path.with_name(f"{path.name}.replaced-{os.getpid()}")
    if path.parent.is_dir():
        _clear_leftovers(path)
    check_replaceable(path, replaceable_with)
    partial.mkdir()
    try:
        with _locked(partial) as is_locked:
            if is_locked is False:
                raise SurgeryError(f"{path}: another process writes it, too")
            yield partial
            sync_directory(partial)
            # Checked again, because writing takes long.
            check_replaceable(path, replaceable_with)
            if path.exists():
                path.rename(aside)
            partial.rename(path)
            sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(path: Path, replaceable_with: str | None) -> None:
    """Raise :class:`SurgeryError` where ``path`` may not be written."""
    if not path.parent.is_dir():
        raise SurgeryError(f"{path}: no directory {path.parent}, allowed: one that exists")
    if not os.path.lexists(path):
        return
    if replaceable_with is None:
        raise SurgeryError(
            f"{path}: exists, allowed: a new directory, unless it is to be overwritten"
        )
    if not (path / replaceable_with).is_file():
        raise SurgeryError(
            f"{path}: exists and holds no {replaceable_with}, allowed to be overwritten: "
            "what an export has written"
        )


def check_space(path: Path, num_bytes: int) -> None:
    """Raise :class:`SurgeryError` where ``num_bytes`` do not fit on the disk of ``path``."""
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise SurgeryError(
            f"{path}: needs {num_bytes} bytes ({num_bytes / _GIB:.1f} GiB), but {free} bytes "
            f"({free / _GIB:.1f} GiB) are free there"
        )


def _clear_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f"{_escaped(path.name)}.replaced-*"):
        if os.path.lexists(path):
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(path)
    for leftover in path.parent.glob(f"{_escaped(path.name)}.partial-*"):
        with suppress(FileNotFoundError), _locked(leftover) as is_locked:
            if not is_locked:
                raise SurgeryError(
                    f"{path}: another process writes it, to {leftover.name}; if none does, "
                    "remove that directory"
                )
            shutil.rmtree(leftover)


@contextmanager
def _locked(directory: Path) -> Iterator[bool | None]:
    """Lock a directory; the lock ends with the process.

    Yields False if another process has the lock, None if the file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked: bool | None = True
        except BlockingIOError:
            is_locked = False
        except OSError:
            is_locked = None
        yield is_locked
    finally:
        os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
