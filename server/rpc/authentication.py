"""Who makes a call of gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from server.access.authenticator import Authenticator, bearer_token
from server.access.clients import Client
from server.calls.caller import Caller
from server.errors import Unauthenticated
from server.rpc.peer import host_of, peer_address

Context = grpc.aio.ServicerContext[Any, Any]

_CERTIFICATE_NAMES = "x509_common_name", "x509_subject_alternative_name", "peer_uri"


def client_of(authenticator: Authenticator, context: Context) -> Client | None:
    """Return the client that makes a call; see :meth:`Authenticator.identify`."""
    names = _certificate_names(context) if authenticator.requires_certificates else []
    return authenticator.identify(lambda: _token(context), names)


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
    if len(values) > 1:
        raise Unauthenticated("authorization: allowed: Bearer with a token, once")
    return bearer_token(str(values[0]))


def _certificate_names(context: Context) -> list[str]:
    properties = context.auth_context()
    return [
        value.decode(errors="replace")
        for name in _CERTIFICATE_NAMES
        for value in properties.get(name, ())
    ]
