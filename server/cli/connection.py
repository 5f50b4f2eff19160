"""The connection of the commands that talk to a server."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from server.rpc.client import CallError, Client
from server.rpc.client_tls import ClientTls

DEFAULT_ADDRESS = "127.0.0.1:50051"
# The token is no flag, because every user of a machine can see the flags of its processes.
TOKEN_VARIABLE = "FATHOM_TOKEN"


@dataclass(frozen=True, slots=True)
class Connection:
    """The address of a server, and what to prove to it."""

    address: str
    tls: ClientTls | None = None
    token: str | None = None


def _connection(
    address: Annotated[
        str, typer.Option(envvar="FATHOM_ADDRESS", help="HOST:PORT of the server's gRPC.")
    ] = DEFAULT_ADDRESS,
    tls: Annotated[
        bool, typer.Option("--tls", envvar="FATHOM_TLS", help="Use TLS; --tls-ca implies it.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="FATHOM_TLS_CA",
            help="Authorities in PEM, one of which has signed the server's certificate; "
            "none: the well-known ones.",
        ),
    ] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            envvar="FATHOM_TLS_SERVER_NAME",
            help="Name in the server's certificate, if not that of the address.",
        ),
    ] = None,
    client_certificate: Annotated[
        Path | None,
        typer.Option(envvar="FATHOM_CLIENT_CERTIFICATE", help="Certificate to show, in PEM."),
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(envvar="FATHOM_CLIENT_KEY", help="Its key, in PEM.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="FATHOM_TOKEN_FILE",
            help=f"File with the token to send; without it, {TOKEN_VARIABLE} is.",
        ),
    ] = None,
) -> Connection:
    if (client_certificate is None) != (client_key is None):
        raise typer.BadParameter("--client-certificate and --client-key need each other")
    client_tls = None
    if tls or tls_ca or client_certificate or tls_server_name:
        client_tls = ClientTls(
            ca=_read(tls_ca, "--tls-ca"),
            certificate=_read(client_certificate, "--client-certificate"),
            key=_read(client_key, "--client-key"),
            server_name=tls_server_name,
        )
    token = os.environ.get(TOKEN_VARIABLE)
    if token_file is not None:
        token = (_read(token_file, "--token-file") or b"").decode(errors="replace")
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()):
        raise typer.BadParameter("the token may have printable ASCII characters alone")
    return Connection(address, client_tls, token or None)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``connection`` of a command by the flags of a connection.

    A flag that both have is given to both.
    """
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(_connection, eval_str=True).parameters.values()

    @functools.wraps(command)
    def connecting(**given: Any) -> None:
        flags = {parameter.name: given[parameter.name] for parameter in shared}
        given = {name: value for name, value in given.items() if name in own}
        command(**given, connection=_connection(**flags))

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in [*own.values(), *(each for each in shared if each.name not in own)]
        if parameter.name != "connection"
    ]
    connecting.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    connecting.__annotations__ = {each.name: each.annotation for each in parameters}
    return connecting


@contextmanager
def connected(connection: Connection) -> Iterator[Client]:
    """Yield a client; if no server answers, the error says how to start one."""
    try:
        with Client(connection.address, tls=connection.tls, token=connection.token) as client:
            yield client
    except CallError as error:
        # gRPC begins its own messages like this if no server has answered.
        if error.code == "UNAVAILABLE" and error.message.startswith(
            ("failed to connect", "DNS resolution failed", "errors resolving")
        ):
            if "handshake failed" in error.message.lower():
                reason = error.message.rpartition("handshake failed")[2].strip(" ():")
                problem = f"the TLS handshake with {connection.address} failed: {reason}"
            else:
                problem = (
                    f"no server answers at {connection.address}; start one with 'fathom serve', "
                    "or name another with --address or FATHOM_ADDRESS"
                )
            raise CallError(error.code, problem, error.retry_after) from None
        raise


def _read(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{flag}: {path}: {error.strerror}") from None
