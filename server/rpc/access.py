"""TLS and authentication, from files that are read again when they change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.access.authenticator import Authenticator
from server.access.certificates import CertificateFiles, Certificates
from server.access.clients import ClientList, load_clients
from server.access.file_watch import FileWatch
from server.errors import InvalidArgument
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
    def chain_paths(self) -> list[Path]:
        certificates = self.certificates
        return [] if certificates is None else [certificates.certificate, certificates.key]

    @property
    def client_ca_paths(self) -> list[Path]:
        certificates = self.certificates
        if certificates is None or certificates.client_ca is None:
            return []
        return [certificates.client_ca]

    @property
    def clients_paths(self) -> list[Path]:
        return [] if self.clients is None else [self.clients]

    def load(self) -> tuple[Certificates | None, ClientList | None]:
        """Read all files.

        Raises :class:`InvalidArgument`, naming the setting, for a file that is wrong.
        """
        certificates = None if self.certificates is None else self.certificates.load()
        return certificates, self.load_clients()

    def load_clients(self) -> ClientList | None:
        """Read the clients alone."""
        clients = None if self.clients is None else load_clients(self.clients)
        if clients is not None and clients.uses_certificates and not self.client_ca_paths:
            raise InvalidArgument(
                "clients", "certificate:", "tokens alone, unless tls_client_ca is set"
            )
        return clients


class Access:
    """TLS and authentication that follow their files.

    The certificate with its key, the authorities of clients, and the clients are read
    independently. If one of them is invalid, that is logged, and its last valid content stays in
    force; the others are replaced.
    """

    def __init__(
        self, files: AccessFiles, metrics: Metrics, *, anonymous_control: bool = True
    ) -> None:
        """Read the files; raise :class:`InvalidArgument` for a file that is wrong.

        ``anonymous_control``: whether callers may operate the server if no clients are known.
        """
        self._certificates, clients = files.load()
        self._files = files
        self._metrics = metrics
        self.tls = None if self._certificates is None else ServerTls(self._certificates)
        self._followers: list[Callable[[Certificates], None]] = []
        self.authenticator = Authenticator(
            clients,
            requires_certificates=self.tls is not None and self.tls.requires_client_certificates,
            anonymous_control=anonymous_control,
        )
        self._watches = (
            FileWatch(lambda: self._files.chain_paths, self._read_chain, "certificate and key"),
            FileWatch(lambda: self._files.client_ca_paths, self._read_client_ca, "authorities"),
            FileWatch(lambda: self._files.clients_paths, self._read_clients, "clients"),
        )
        self._note_expiry()

    @property
    def certificates(self) -> Certificates | None:
        """The certificates in force; None: connections are plain text."""
        return self._certificates

    def add_follower(self, install: Callable[[Certificates], None]) -> None:
        """Call ``install`` with the certificates whenever others come into force."""
        self._followers.append(install)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the files as they are now."""
        return [watch.problem for watch in self._watches if watch.problem]

    async def follow(self, seconds: float = 1.0) -> None:
        """Read the files again whenever they change, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            for watch in self._watches:
                watch.look()

    def prepare(self, files: AccessFiles) -> Callable[[], None]:
        """Check files that are to take the place of the present ones; return what reads them.

        Raises :class:`InvalidArgument` for a new file that is wrong, and if TLS, client
        certificates or known clients would be turned on or off, which takes a restart. Files
        that stay the same are not checked: those that are broken are tried again anyway.
        """
        present = self._files
        for setting, before, after in (
            ("tls_certificate", present.chain_paths, files.chain_paths),
            ("tls_client_ca", present.client_ca_paths, files.client_ca_paths),
            ("clients", present.clients_paths, files.clients_paths),
        ):
            if bool(before) != bool(after):
                change = "a file" if after else "none"
                raise InvalidArgument(setting, change, "as at the start, until a restart")
        if files.certificates is not None:
            if files.chain_paths != present.chain_paths:
                files.certificates.load_chain()
            if files.client_ca_paths != present.client_ca_paths:
                files.certificates.load_client_ca()
        if files.clients_paths != present.clients_paths:
            files.load_clients()

        def install() -> None:
            self._files = files
            are_read = [watch.read_now() for watch in self._watches]
            if all(are_read) and (files.certificates or files.clients):
                logger.info("certificates and clients have been read again")

        return install

    def _read_chain(self) -> None:
        if self._files.certificates is not None:
            chain, key, expires = self._files.certificates.load_chain()
            self._install(chain=chain, key=key, expires=expires)
            self._note_expiry()

    def _read_client_ca(self) -> None:
        if self._files.client_ca_paths and self._files.certificates is not None:
            self._install(client_ca=self._files.certificates.load_client_ca())

    def _read_clients(self) -> None:
        if (clients := self._files.load_clients()) is not None:
            self.authenticator.install(clients)

    def _install(self, **changed: Any) -> None:
        assert self.tls is not None
        assert self._certificates is not None
        self._certificates = replace(self._certificates, **changed)
        self.tls.install(self._certificates)
        for install in self._followers:
            install(self._certificates)

    def _note_expiry(self) -> None:
        if self._certificates is not None:
            self._metrics.set_certificate_expiry(self._certificates.expires.timestamp())
