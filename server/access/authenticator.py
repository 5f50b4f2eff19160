"""Authentication and authorization of callers, whatever transport they come by."""

from __future__ import annotations

from collections.abc import Callable, Collection

from server.access.clients import Client, ClientList, Permission
from server.errors import PermissionDenied, Unauthenticated


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

    @property
    def requires_certificates(self) -> bool:
        """Whether every caller shows a certificate."""
        return self._requires_certificates

    def by_token(self, token: str | None) -> Client | None:
        """Return the client of a caller that can show no certificate; see :meth:`identify`."""
        if self._clients is None and self._requires_certificates:
            raise Unauthenticated("clients prove who they are by certificates, over gRPC alone")
        return self.identify(lambda: token, ())

    def identify(
        self, read_token: Callable[[], str | None], certificate_names: Collection[str]
    ) -> Client | None:
        """Return the client that makes a call, None if there is no list of clients.

        ``read_token`` returns the token that the caller sends, and is not called where tokens do
        not count; ``certificate_names`` are those in the caller's verified certificate. Raises
        :class:`Unauthenticated` if there is a list and the caller is not on it.
        """
        if self._clients is None:
            # A certificate alone does not permit operating the server.
            permissions = frozenset({Permission.INFERENCE})
            name = next(iter(certificate_names), None)
            return None if name is None else Client(name, permissions)
        token = read_token()
        if token is not None:
            client = self._clients.by_token(token)
            if client is None:
                raise Unauthenticated("authorization: no client has this token")
            return client
        client = self._clients.by_certificate(certificate_names)
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


def bearer_token(header: str) -> str:
    """Return the token in the value of a header ``authorization``.

    Raises :class:`Unauthenticated` for one of another kind.
    """
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("authorization: allowed: Bearer with a token, once")
    return token.strip()
