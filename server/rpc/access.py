"""TLS and authentication, from files that are read again when they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.access.certificates import CertificateFiles, Certificates
from server.access.clients import ClientList, load_clients
from server.access.file_watch import FileWatch
from server.errors import FathomError, InvalidArgument
from server.rpc.authentication import Authenticator
from server.rpc.tls import ServerTls
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AccessFiles:
    """The files of certificates and clients.

    Without ``certificates`` connections are plain text; without ``clients`` anybody may call.
    """

    certificates: CertificateFiles | None = None
    clients: Path | None = None

    @property
    def paths(self) -> list[Path]:
        paths = [] if self.certificates is None else self.certificates.paths
        return paths if self.clients is None else [*paths, self.clients]

    def load(self) -> tuple[Certificates | None, ClientList | None]:
        """Read all files.

        Raises :class:`InvalidArgument`, naming the setting, for a file that is wrong.
        """
        certificates = None if self.certificates is None else self.certificates.load()
        clients = None if self.clients is None else load_clients(self.clients)
        client_ca = None if certificates is None else certificates.client_ca
        if clients is not None and clients.uses_certificates and client_ca is None:
            raise InvalidArgument(
                "clients", "certificate:", "tokens alone, unless tls_client_ca is set"
            )
        return certificates, clients


class Access:
    """TLS and authentication that follow their files.

    If a file is broken, that is logged, and what was read before stays in force.
    """

    def __init__(
        self, files: AccessFiles, metrics: Metrics, *, anonymous_control: bool = True
    ) -> None:
        """Read the files; raise :class:`InvalidArgument` for a file that is wrong.

        ``anonymous_control``: whether callers may operate the server if no clients are known.
        """
        certificates, clients = files.load()
        self._files = files
        self._metrics = metrics
        self.tls = None if certificates is None else ServerTls(certificates)
        self.authenticator = Authenticator(
            clients,
            requires_certificates=self.tls is not None and self.tls.requires_client_certificates,
            anonymous_control=anonymous_control,
        )
        self._watch = FileWatch(lambda: self._files.paths, self.reload)
        self._note_expiry(certificates)

    async def follow(self, seconds: float = 1.0) -> None:
        """Read the files again whenever they change, until cancelled."""
        await self._watch.run(seconds)

    def reload(self) -> None:
        """Read the files again; log what is wrong with them."""
        try:
            self.prepare(self._files)()
        except FathomError as error:
            logger.error("%s; what was read before stays in force", error)

    def prepare(self, files: AccessFiles) -> Callable[[], None]:
        """Read files, and return a function that puts them into force.

        Raises :class:`InvalidArgument` for a file that is wrong, and if TLS, client certificates
        or known clients would be turned on or off, which takes a restart.
        """
        for setting, before, after in (
            ("tls_certificate", self._files.certificates, files.certificates),
            ("tls_client_ca", _client_ca(self._files), _client_ca(files)),
            ("clients", self._files.clients, files.clients),
        ):
            if (before is None) != (after is None):
                change = "none" if after is None else "a file"
                raise InvalidArgument(setting, change, "as at the start, until a restart")
        certificates, clients = files.load()

        def install() -> None:
            self._files = files
            if self.tls is not None and certificates is not None:
                self.tls.install(certificates)
            if clients is not None:
                self.authenticator.install(clients)
            self._watch.forget()
            self._note_expiry(certificates)
            if files.paths:
                logger.info("certificates and clients have been read again")

        return install

    def _note_expiry(self, certificates: Certificates | None) -> None:
        if certificates is not None:
            self._metrics.set_certificate_expiry(certificates.expires.timestamp())


def _client_ca(files: AccessFiles) -> Path | None:
    return None if files.certificates is None else files.certificates.client_ca
