"""The file of clients: names, permissions, and tokens or names of certificates.

It is a text file with one client on each line, in three columns:

    # name   permissions         a token, the SHA-256 of one, or the name in a certificate
    alice    inference           dGhlIHRva2VuIG9mIGFsaWNl
    ops      inference,control   sha256:<64 hexadecimal digits>
    batch    inference           certificate:batch.internal

A name may have several lines, so that a new token can be added before the old one is removed.
Errors never show a token.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from server.errors import InvalidArgument

_MAX_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
# RFC 6750, section 2.1; the shortest is 96 bits in base64.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,1024}=*")
_HASH = re.compile(r"[0-9a-f]{64}")
_CREDENTIAL_ALLOWED = (
    "a token of 16 to 1024 letters, digits and '-._~+/', sha256: with 64 lower-case hexadecimal "
    "digits, or certificate: with a name"
)

logger = logging.getLogger(__name__)


class Permission(enum.Enum):
    """What a client may call."""

    INFERENCE = "inference"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Client:
    """A client: a name and what it may call."""

    name: str
    permissions: frozenset[Permission]


class ClientList:
    """The clients, by token and by name of certificate."""

    def __init__(
        self, by_token_hash: dict[bytes, Client], by_certificate_name: dict[str, Client]
    ) -> None:
        """The keys of ``by_token_hash`` are SHA-256 digests."""
        self._by_token_hash = by_token_hash
        self._by_certificate_name = by_certificate_name

    @property
    def uses_certificates(self) -> bool:
        return bool(self._by_certificate_name)

    def by_token(self, token: str) -> Client | None:
        """Return the client with that token; the time it takes does not depend on the token."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for known, client in self._by_token_hash.items():
            if hmac.compare_digest(known, digest):
                found = client
        return found

    def by_certificate(self, names: Collection[str]) -> Client | None:
        """Return the client of a verified certificate that has these names."""
        return next(
            (client for name, client in self._by_certificate_name.items() if name in names), None
        )


def load_clients(path: Path) -> ClientList:
    """Read a file of clients.

    Raises:
        InvalidArgument: the file cannot be read, or a line is wrong.
    """
    try:
        data = path.read_bytes()
        readable_by_all = bool(path.stat().st_mode & stat.S_IROTH)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("clients", str(path), f"a text file of clients ({error})") from None
    if len(data) > _MAX_BYTES:
        raise InvalidArgument("clients", f"{len(data)} bytes", f"at most {_MAX_BYTES} bytes")
    clients = _parse(text, path)
    if readable_by_all:
        logger.warning("clients: every user of this machine can read %s; try chmod 600", path)
    return clients


def _parse(text: str, path: Path) -> ClientList:
    by_token_hash: dict[bytes, Client] = {}
    by_certificate_name: dict[str, Client] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.split()
        if not columns or columns[0].startswith("#"):
            continue
        field = f"clients: {path}, line {number}"
        if len(columns) != 3:
            allowed = "three: name, permissions and token"
            raise InvalidArgument(field, f"{len(columns)} columns", allowed)
        name, permissions, credential = columns
        if not _NAME.fullmatch(name):
            allowed = "at most 64 letters, digits and '_.@-', the first a letter or a digit"
            raise InvalidArgument(f"{field}: name", name, allowed)
        client = Client(name, _permissions(permissions, f"{field}: permissions"))
        kind, colon, value = credential.partition(":")
        is_new = False
        if kind == "certificate" and value:
            is_new = by_certificate_name.setdefault(value, client) is client
        elif (kind == "sha256" and _HASH.fullmatch(value)) or (
            not colon and _TOKEN.fullmatch(credential)
        ):
            digest = bytes.fromhex(value) if colon else hashlib.sha256(kind.encode()).digest()
            is_new = by_token_hash.setdefault(digest, client) is client
        else:
            raise InvalidArgument(f"{field}: token", "another value", _CREDENTIAL_ALLOWED)
        if not is_new:
            allowed = "a token or certificate of its own for every line"
            raise InvalidArgument(field, f"that of another line for {name}", allowed)
    if not by_token_hash and not by_certificate_name:
        raise InvalidArgument("clients", str(path), "a file with at least one client")
    return ClientList(by_token_hash, by_certificate_name)


def _permissions(text: str, field: str) -> frozenset[Permission]:
    try:
        return frozenset(Permission(name) for name in text.split(","))
    except ValueError:
        raise InvalidArgument(field, text, "inference, control, or inference,control") from None
