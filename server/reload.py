"""Settings that are read again while the server serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from server.access.certificates import CertificateFiles
from server.access.file_watch import file_version
from server.config import ConfigError, Settings, warn_of_old_names
from server.depth.levels import LevelSpec
from server.errors import FathomError
from server.model.inputs import auto_rules, chosen_levels
from server.rpc.access import Access, AccessFiles
from server.serving.service import Service

_ACCESS = {"tls_certificate", "tls_key", "tls_client_ca", "clients"}
_LEVELS = {"levels", "default_level"}
_AUTO = {name for name in Settings.model_fields if name.startswith("auto_")}
_RELOADED = {"log_level", *_ACCESS, *_LEVELS, *_AUTO}

logger = logging.getLogger(__name__)


class SettingsFile:
    """The file of the settings, which are read again when it changes.

    A Kubernetes ConfigMap that is mounted as a directory changes in this way.
    """

    def __init__(self, path: Path, read: Callable[[], Settings]) -> None:
        """``read`` reads all settings, those of the file at ``path`` included."""
        self._path = path
        self._read = read
        self._seen = file_version(path)

    def read(self) -> Settings:
        """Read the settings; what the file is now is no change any more."""
        self._seen = file_version(self._path)
        return self._read()

    async def follow(self, changed: asyncio.Event, seconds: float = 1.0) -> None:
        """Set ``changed`` whenever the file has changed, and stayed the same for a look."""
        latest = self._seen
        while True:
            await asyncio.sleep(seconds)
            before, latest = latest, file_version(self._path)
            if before == latest != self._seen:
                changed.set()


class Reload:
    """Brings a running server to what its settings say now.

    Levels, the rules of automatic depth, clients, certificates and the log level are changed.
    For other settings that have changed, the log says that they take a restart. Levels that a
    client has set stay, unless the levels in the settings change.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        *,
        access: Access,
        service: Service,
        set_log_level: Callable[[str], None],
        retry_seconds: float = 1.0,
    ) -> None:
        """``settings`` are those that the server was started with, ``read`` reads them again."""
        self._settings = settings
        self._read = read
        self._access = access
        self._service = service
        self._set_log_level = set_log_level
        self._retry_seconds = retry_seconds
        self._running = asyncio.Lock()
        # What is wrong with the settings as they are now; empty if nothing is.
        self.problem = ""

    async def follow(self, asked: asyncio.Event) -> None:
        """Read the settings again whenever ``asked`` is set, until cancelled.

        Settings that are wrong, as those of a file that is half written are, are read again until
        they are right.
        """
        problem = ""
        while True:
            await asked.wait()
            asked.clear()
            try:
                problem = self.problem = await self.run(known_problem=problem)
            except BaseException:
                asked.set()  # the next run of this task finds that there is something to do
                raise
            if problem:
                with suppress(TimeoutError):
                    await asyncio.wait_for(asked.wait(), self._retry_seconds)
                    problem = ""  # asked anew, it is told again
                asked.set()

    async def run(self, *, known_problem: str = "") -> str:
        """Read the settings and the files that they name; return what is wrong with them.

        Nothing changes then. The problem is logged unless it is ``known_problem``; where there is
        none, an empty text is returned.
        """
        async with self._running:
            old = self._settings
            try:
                new = self._read()
                levels, default_level = chosen_levels(new, self._service.policy.num_layers)
                install_access = self._access.prepare(access_files(new))
            except (ConfigError, FathomError) as error:
                problem = "; ".join(str(error).splitlines())
                if problem != known_problem:
                    logger.error("%s; the settings have not been changed", problem)
                return problem
            warn_of_old_names(new.old_names)
            changed = {
                name for name in Settings.model_fields if getattr(old, name) != getattr(new, name)
            }
            install_access()
            self._set_log_level(new.log_level)
            done = _RELOADED & changed
            if changed & _LEVELS and not await self._set_levels(levels, default_level):
                done -= _LEVELS
            if changed & _AUTO and not self._set_auto_rules(new):
                done -= _AUTO
            self._settings = old.model_copy(update={name: getattr(new, name) for name in done})
            logger.info("settings read again; changed: %s", _listed(done))
            if others := changed - _RELOADED:
                logger.warning("settings that take a restart to change: %s", _listed(others))
            return ""

    async def _set_levels(self, levels: Sequence[LevelSpec], default_level: str) -> bool:
        try:
            with self._service.updating() as updates:
                await updates.set_levels(levels, default_level)
        except FathomError as error:
            logger.error("%s; the levels have not been changed", error)
            return False
        return True

    def _set_auto_rules(self, settings: Settings) -> bool:
        try:
            self._service.set_auto_rules(auto_rules(settings))
        except FathomError as error:
            logger.error("%s; auto_levels have not been changed", error)
            return False
        return True


def access_files(settings: Settings) -> AccessFiles:
    """Return the files of certificates and clients that the settings name."""
    certificates = None
    if settings.tls_certificate is not None and settings.tls_key is not None:
        certificates = CertificateFiles(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca
        )
    return AccessFiles(certificates, settings.clients)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
