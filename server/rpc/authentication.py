"""Who may call what."""

from __future__ import annotations

from typing import Any

import grpc

from server.access.clients import Client, ClientList, Permission
from server.calls.caller import Caller
from server.errors import PermissionDenied, Unauthenticated
from server.rpc.peer import host_of, peer_address

Context = grpc.aio.ServicerContext[Any, Any]

_CERTIFICATE_NAMES = "x509_common_name", "x509_subject_alternative_name", "peer_uri"


class Authenticator:
    """Knows the clients.

    Without a list of clients, whoever can connect may call: everything where no client
    certificates are asked for, else inference alone.
    """

    def __init__(
        self, clients: ClientList | None = None, *, requires_certificates: bool = False
    ) -> None:
        self._clients = clients
        self._requires_certificates = requires_certificates

    def install(self, clients: ClientList) -> None:
        """Let these be the clients from now on; calls that run go on."""
        self._clients = clients

    def client(self, context: Context) -> Client | None:
        """Return the client that makes a call, None where clients are not known.

        Raises :class:`Unauthenticated` where they are, and this is none of them.
        """
        names = _certificate_names(context) if self._requires_certificates else []
        if self._clients is None:
            # Operating the server takes more than a certificate of the right authority.
            permissions = frozenset({Permission.INFERENCE})
            return Client(names[0], permissions) if names else None
        token = _token(context)
        if token is not None:
            client = self._clients.by_token(token)
            if client is None:
                raise Unauthenticated("authorization: no client has this token")
            return client
        client = self._clients.by_certificate(names)
        if client is None:
            raise Unauthenticated("authorization: a bearer token is needed")
        return client


def caller_of(context: Context, client: Client | None) -> Caller:
    """Return who makes a call: the client, or the machine of one that is not known."""
    peer = peer_address(context.peer())
    if client is None:
        return Caller(client=host_of(peer), peer=peer)
    return Caller(client=client.name, peer=peer, is_known=True)


def require(permission: Permission, client: Client | None) -> None:
    """Raise :class:`PermissionDenied` for a client that is known and lacks the permission."""
    if client is not None and permission not in client.permissions:
        raise PermissionDenied(f"client {client.name} lacks the permission {permission.value}")


def _token(context: Context) -> str | None:
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not values:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("authorization: allowed: Bearer with a token, once")
    return token.strip()


def _certificate_names(context: Context) -> list[str]:
    properties = context.auth_context()
    return [
        value.decode(errors="replace")
        for name in _CERTIFICATE_NAMES
        for value in properties.get(name, ())
    ]
