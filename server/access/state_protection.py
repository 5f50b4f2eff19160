"""Protection of the state directory against other users of the machine.

The server runs code that it keeps there: the compiled layers of the elastic engine, in
``compiled``. A user who can write there can run code as the server's user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from server.errors import InvalidArgument

_COMPILED = "compiled"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ONLY_OWNER = 0o700
_ROOT = 0

logger = logging.getLogger(__name__)


def protect_state(directory: Path) -> None:
    """Refuse a state directory that others may have written to; close ``compiled`` to them.

    A directory that does not exist, or is none, is left to those that write to it: they create
    it for this user alone, and report it if they cannot.

    Raises:
        InvalidArgument: somebody other than this user and root owns the directory or a part of
            ``compiled``, or others may write to it.
    """
    compiled = directory / _COMPILED
    if problem := _problem(directory):
        remove = f"rm -rf {_quoted(compiled)}"
        raise _refusal(
            directory,
            problem,
            f"name another directory, or make this one your own, then {remove} and "
            f"chmod go-w {_quoted(directory)}",
        )
    for path in _with_contents(compiled):
        if problem := _problem(path):
            remedy = f"rm -rf {_quoted(compiled)}, which the server makes again"
            raise _refusal(directory, problem, remedy)
    for parent in directory.absolute().parents:
        if problem := _problem(parent, sticky_is_safe=True):
            logger.warning("%s, so %s could be replaced by another", problem, directory)
    with contextlib.suppress(OSError):
        compiled.chmod(_ONLY_OWNER)


def _problem(path: Path, *, sticky_is_safe: bool = False) -> str | None:
    """Return who other than this user and root may change ``path`` or what it links to.

    In a directory with the sticky bit, such as /tmp, users cannot replace files of others.
    """
    for follow_symlinks in (False, True):
        try:
            status = path.stat(follow_symlinks=follow_symlinks)
        except OSError:
            return None  # it does not exist, or cannot be read and so not be run
        if status.st_uid not in (os.geteuid(), _ROOT):
            return f"{path} belongs to {_user(status.st_uid)}"
        is_sticky = sticky_is_safe and status.st_mode & stat.S_ISVTX
        if status.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(status.st_mode) and not is_sticky:
            return f"other users can write to {path} (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _refusal(directory: Path, problem: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(
        "state_dir",
        str(directory),
        "a directory that only the server's user and root can write to, because the server runs "
        f"compiled code that it keeps there; {problem}: {remedy}",
    )


def _with_contents(directory: Path) -> Iterator[Path]:
    yield directory
    for place, folders, files in os.walk(directory):
        for name in (*folders, *files):
            yield Path(place, name)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
