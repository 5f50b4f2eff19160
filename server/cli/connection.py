"""What the commands that talk to a server share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from server.rpc.client import CallError, Client

DEFAULT_ADDRESS = "127.0.0.1:50051"

Address = Annotated[
    str, typer.Option(envvar="FATHOM_ADDRESS", help="HOST:PORT of the server's gRPC.")
]


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """Yield a client; a server that is not there is reported with how to start one."""
    try:
        with Client(address) as client:
            yield client
    except CallError as error:
        # What the library says itself where no server has answered.
        if error.code == "UNAVAILABLE" and error.message.startswith(
            ("failed to connect", "DNS resolution failed", "errors resolving")
        ):
            raise CallError(
                error.code,
                f"no server answers at {address}; start one with 'fathom serve', "
                "or name another with --address or FATHOM_ADDRESS",
                error.retry_after,
            ) from None
        raise
