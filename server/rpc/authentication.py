"""Authentication and authorization of callers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import grpc

from server.access.clients import Client, ClientList, Permission
from server.calls.caller import Caller
from server.errors import PermissionDenied, Unauthenticated
from server.rpc.peer import host_of, peer_address

Context = grpc.aio.ServicerContext[Any, Any]

_CERTIFICATE_NAMES = "x509_common_name", "x509_subject_alternative_name", "peer_uri"


class Authenticator:
    """Finds the client that makes a call.

    Without a list of clients, everybody who can connect may call ``Inference``. ``Control`` needs
    ``anonymous_control`` then, and a list of clients where client certificates are required.
    """

    def __init__(
        self,
        clients: ClientList | None = None,
        *,
        requires_certificates: bool = False,
        anonymous_control: bool = True,
    ) -> None:
        self._clients = clients
        self._requires_certificates = requires_certificates
        self._anonymous_control = anonymous_control

    def install(self, clients: ClientList) -> None:
        """Replace the list of clients; running calls go on."""
        self._clients = clients

    @property
    def knows_clients(self) -> bool:
        """Whether callers have to prove who they are."""
        return self._clients is not None or self._requires_certificates

    def by_token(self, token: str | None) -> Client | None:
        """Return the client of a caller that can show no certificate; see :meth:`client`."""
        if self._clients is None and self._requires_certificates:
            raise Unauthenticated("clients prove who they are by certificates, over gRPC alone")
        return self._client(token, [])

    def client(self, context: Context) -> Client | None:
        """Return the client that makes a call, None if there is no list of clients.

        Raises :class:`Unauthenticated` if there is a list and the caller is not on it.
        """
        names = _certificate_names(context) if self._requires_certificates else []
        if self._clients is None:
            # A certificate alone does not permit operating the server.
            permissions = frozenset({Permission.INFERENCE})
            return Client(names[0], permissions) if names else None
        return self._client(_token(context), names)

    def _client(self, token: str | None, names: Collection[str]) -> Client | None:
        if self._clients is None:
            return None
        if token is not None:
            client = self._clients.by_token(token)
            if client is None:
                raise Unauthenticated("authorization: no client has this token")
            return client
        client = self._clients.by_certificate(names)
        if client is None:
            raise Unauthenticated("authorization: a bearer token is needed")
        return client

    def require(self, permission: Permission, client: Client | None) -> None:
        """Raise :class:`PermissionDenied` for a caller that lacks the permission."""
        if client is None:
            if permission is Permission.CONTROL and not self._anonymous_control:
                raise PermissionDenied(
                    "callers that are not known lack the permission control; the server's "
                    "settings clients and anonymous_control say who has it"
                )
        elif permission not in client.permissions:
            raise PermissionDenied(f"client {client.name} lacks the permission {permission.value}")


def caller_of(context: Context, client: Client | None) -> Caller:
    """Return who makes a call: the client, or the caller's address if the client is not known."""
    peer = peer_address(context.peer())
    if client is None:
        return Caller(client=host_of(peer), peer=peer)
    return Caller(client=client.name, peer=peer, is_known=True)


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
