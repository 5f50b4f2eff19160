"""``fathom health``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from server.cli.connection import Connection, connected, with_connection


@with_connection
def health(
    connection: Connection,
    service: Annotated[
        str, typer.Option(help="fathom.v1.Inference or fathom.v1.Control; none: the whole server.")
    ] = "",
) -> None:
    """Print whether the server serves; the exit code is 0 if it does and 1 if not."""
    with connected(connection) as client:
        status = client.health(service)
    print(status)
    sys.exit(0 if status == "SERVING" else 1)
