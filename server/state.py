"""The state directory: entries that outlive a server, and that several servers may share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from pruning.durable import replace_file

FORMAT_VERSION = 1
LOCK_POLL_SECONDS = 0.2
LOCK_REPORT_SECONDS = 30.0
# Only the owner has access, because the entries decide what a server runs.
DIRECTORY_MODE = 0o700

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StateError(ValueError):
    """An entry that is damaged, has another format, or belongs to another key."""


class EntryFormat(Protocol[T]):
    """The file format of one kind of entry.

    ``load`` raises :class:`ValueError` for a file that is not such an entry. ``save`` replaces the
    whole file at once: a reader sees the old entry or the new one, never a part.
    """

    def load(self, path: Path) -> T: ...

    def save(self, value: T, path: Path) -> None: ...


class JsonEntry(EntryFormat[T]):
    """Entries of type ``type_`` as JSON, with their key and a checksum."""

    def __init__(self, type_: type[T], key: Mapping[str, object]) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(type_)
        self._key = json.loads(_canonical(key))

    def load(self, path: Path) -> T:
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise StateError(f"not a complete JSON document: {error}") from None
        if not isinstance(document, dict):
            raise StateError("not a JSON object")
        if (version := document.get("format_version")) != FORMAT_VERSION:
            raise StateError(f"format_version: found {version!r}, allowed: {FORMAT_VERSION}")
        if document.get("key") != self._key:
            raise StateError("key: made for another model or with other settings")
        content = document.get("content")
        if document.get("sha256") != _digest(content):
            raise StateError("sha256: the content is not what was written")
        try:
            return self._adapter.validate_python(content)
        except ValidationError as error:
            details = error.errors()[0]
            location = ".".join(map(str, ("content", *details["loc"])))
            raise StateError(f"{location}: {details['msg']}") from None

    def save(self, value: T, path: Path) -> None:
        content = self._adapter.dump_python(value, mode="json")
        document = {
            "format_version": FORMAT_VERSION,
            "key": self._key,
            "sha256": _digest(content),
            "content": content,
        }
        replace_file(path, f"{json.dumps(document, indent=2)}\n".encode())


class StateDirectory:
    """Entries by kind and key. An entry that cannot be read or written is logged, not an error.

    The key holds everything that the entry depends on: the fingerprint of the model and the
    settings it was made with. The digest of the key is part of the file's name.
    """

    def __init__(self, path: Path, lock_seconds: float = 600.0) -> None:
        self._path = path
        self._lock_seconds = lock_seconds
        self._reported: set[tuple[Path, str]] = set()

    def path_of(self, kind: str, key: Mapping[str, object]) -> Path:
        return self._path / f"{kind}-{_digest(key)[:32]}.json"

    def load(self, kind: str, key: Mapping[str, object], entry: EntryFormat[T]) -> T | None:
        """Return the entry; None if there is none, or if it is damaged."""
        path = self.path_of(kind, key)
        try:
            return entry.load(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._report_once(path, f"is not used and will be made anew: {error}")
        except OSError as error:
            self._report_once(path, f"cannot be read: {error}")
        return None

    def save(self, kind: str, key: Mapping[str, object], entry: EntryFormat[T], value: T) -> None:
        path = self.path_of(kind, key)
        try:
            path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            entry.save(value, path)
        except OSError as error:
            logger.warning("%s cannot be kept for the next start: %s", path, error)

    async def load_or_make(
        self,
        kind: str,
        key: Mapping[str, object],
        entry: EntryFormat[T],
        make: Callable[[], Awaitable[T]],
    ) -> T:
        """Return the entry; if there is none, or if it is damaged, make and keep it first.

        If several servers need the same entry, one makes it and the others wait for it.
        """
        found = self.load(kind, key, entry)
        if found is not None:
            return found
        async with self.locked(kind, key):
            # Another server may have made it while this one waited.
            found = self.load(kind, key, entry)
            if found is not None:
                return found
            value = await make()
            self.save(kind, key, entry, value)
            return value

    @contextlib.asynccontextmanager
    async def locked(self, kind: str, key: Mapping[str, object]) -> AsyncIterator[None]:
        """Hold the entry's lock.

        The lock only keeps two servers from doing the same work; no data depends on it. So if it
        cannot be acquired, because the directory is not writable or another server holds it too
        long, that is logged and work goes on without it.
        """
        path = self.path_of(kind, key).with_suffix(".lock")
        lock = FileLock(path)
        try:
            path.parent.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            await self._acquire(lock)
        except OSError as error:
            logger.warning("%s cannot be locked: %s", path, error)
        try:
            yield
        finally:
            lock.release()

    def _report_once(self, path: Path, problem: str) -> None:
        if (path, problem) not in self._reported:
            self._reported.add((path, problem))
            logger.warning("%s %s", path, problem)

    async def _acquire(self, lock: FileLock) -> None:
        started = time.monotonic()
        reported = -math.inf
        while True:
            try:
                lock.acquire(timeout=0)
                return
            except Timeout:
                now = time.monotonic()
                if now - started >= self._lock_seconds:
                    logger.warning(
                        "%s was not released for %.0f s; going on without it",
                        lock.lock_file,
                        now - started,
                    )
                    return
                if now - reported >= LOCK_REPORT_SECONDS:
                    logger.info("waiting for another server to release %s", lock.lock_file)
                    reported = now
                await asyncio.sleep(LOCK_POLL_SECONDS)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
