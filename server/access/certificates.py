"""The server's certificate and key, and the authorities of clients' certificates."""

from __future__ import annotations

import datetime
import logging
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from server.errors import InvalidArgument

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Certificates:
    """The server's certificate and key, and the authorities of clients, in PEM."""

    chain: bytes
    key: bytes
    # None where clients need no certificate.
    client_ca: bytes | None
    expires: datetime.datetime


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The files of the server's certificate and key, and of the authorities of clients."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def load(self) -> Certificates:
        """Read all files.

        Raises:
            InvalidArgument: a file cannot be read, the certificate is not valid at this time, or
                the key does not belong to the certificate.
        """
        chain, key, expires = self.load_chain()
        return Certificates(chain, key, self.load_client_ca(), expires)

    def load_chain(self) -> tuple[bytes, bytes, datetime.datetime]:
        """Read the server's certificate and key; return both, in PEM, and when they expire."""
        chain = _read("tls_certificate", self.certificate)
        leaf = _certificates("tls_certificate", self.certificate, chain)[0]
        now = datetime.datetime.now(datetime.UTC)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            validity = f"{leaf.not_valid_before_utc:%F %T} to {leaf.not_valid_after_utc:%F %T} UTC"
            raise InvalidArgument(
                "tls_certificate", str(self.certificate), f"one valid now; it is from {validity}"
            )
        key = _read("tls_key", self.key)
        try:
            public_key = load_pem_private_key(key, password=None).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm):
            allowed = "a private key in PEM without a password"
            raise InvalidArgument("tls_key", str(self.key), allowed) from None
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        if public_key.public_bytes(*form) != leaf.public_key().public_bytes(*form):
            allowed = f"the key of the certificate in {self.certificate}"
            raise InvalidArgument("tls_key", str(self.key), allowed)
        _warn_if_readable(self.key)
        return chain, key, leaf.not_valid_after_utc

    def load_client_ca(self) -> bytes | None:
        """Read the authorities that clients' certificates come from, in PEM; None: there are none.

        Clients need no certificate then.
        """
        if self.client_ca is None:
            return None
        client_ca = _read("tls_client_ca", self.client_ca)
        _certificates("tls_client_ca", self.client_ca, client_ca)
        return client_ca


def _warn_if_readable(key: Path) -> None:
    with suppress(OSError):  # it has been replaced meanwhile
        if key.stat().st_mode & stat.S_IROTH:
            logger.warning("tls_key: every user of this machine can read %s; try chmod 600", key)


def _read(field: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(field, str(path), f"a file in PEM ({error.strerror})") from None


def _certificates(field: str, path: Path, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise InvalidArgument(field, str(path), "one or more certificates in PEM") from None
