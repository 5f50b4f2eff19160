"""Settings that are read again while the server serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from server.access.certificates import CertificateFiles
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
    ) -> None:
        """``settings`` are those that the server was started with, ``read`` reads them again."""
        self._settings = settings
        self._read = read
        self._access = access
        self._service = service
        self._set_log_level = set_log_level
        self._running = asyncio.Lock()

    async def run(self) -> None:
        """Read the settings and the files that they name; what is wrong is logged.

        Nothing changes then.
        """
        async with self._running:
            old = self._settings
            try:
                new = self._read()
                warn_of_old_names(new.old_names)
                levels, default_level = chosen_levels(new, self._service.policy.num_layers)
                install_access = self._access.prepare(access_files(new))
            except (ConfigError, FathomError) as error:
                problem = "; ".join(str(error).splitlines())
                logger.error("%s; the settings have not been changed", problem)
                return
            changed = {
                name for name in Settings.model_fields if getattr(old, name) != getattr(new, name)
            }
            install_access()
            self._set_log_level(new.log_level)
            done = _RELOADED & changed
            if changed & _LEVELS:
                specs = [
                    LevelSpec(level.name, level.decode_layers, level.prefill_layers)
                    for level in levels
                ]
                try:
                    with self._service.updating() as updates:
                        await updates.set_levels(specs, default_level)
                except FathomError as error:
                    logger.error("%s; the levels have not been changed", error)
                    done -= _LEVELS
            if changed & _AUTO:
                try:
                    self._service.set_auto_rules(auto_rules(new))
                except FathomError as error:
                    logger.error("%s; auto_levels have not been changed", error)
                    done -= _AUTO
            self._settings = old.model_copy(update={name: getattr(new, name) for name in done})
            logger.info("settings read again; changed: %s", _listed(done))
            if others := changed - _RELOADED:
                logger.warning("settings that take a restart to change: %s", _listed(others))


def access_files(settings: Settings) -> AccessFiles:
    """Return where certificates and clients are."""
    certificates = None
    if settings.tls_certificate is not None and settings.tls_key is not None:
        certificates = CertificateFiles(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca
        )
    return AccessFiles(certificates, settings.clients)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
