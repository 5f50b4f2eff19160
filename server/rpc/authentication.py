"""Who may call what."""

from __future__ import annotations

from typing import Any

import grpc

from server.caller import Caller
from server.clients import Client, ClientList, Permission
from server.errors import PermissionDenied, Unauthenticated
from server.rpc.peer import host_of, peer_address

Context = grpc.aio.ServicerContext[Any, Any]

_CERTIFICATE_NAMES = "x509_common_name", "x509_subject_alternative_name", "peer_uri"


class Authenticator:
    """Knows the caller of a call, and refuses one that may not make it.

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

    def caller(self, context: Context, permission: Permission | None) -> Caller:
        """Return who makes a call that takes ``permission``, None for that of any client.

        Raises:
            Unauthenticated: there is no token, or no client has it.
            PermissionDenied: the client is known, but may not do this.
        """
        peer = peer_address(context.peer())
        client = self._client(context)
        if client is None:
            return Caller(client=host_of(peer), peer=peer)
        if permission is not None and permission not in client.permissions:
            raise PermissionDenied(f"client {client.name} lacks the permission {permission.value}")
        return Caller(client=client.name, peer=peer)

    def _client(self, context: Context) -> Client | None:
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
