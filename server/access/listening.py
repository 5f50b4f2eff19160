"""Errors for addresses that cannot be listened on."""

from __future__ import annotations

import errno
import socket

from server.errors import InvalidArgument


class PortInUse(InvalidArgument):
    """Another program listens on the port; it may free the port later."""


def cannot_listen(error: OSError, host: str, port: int, prefix: str = "") -> InvalidArgument:
    """Return an error that names the setting at fault: ``host`` or ``port``, after ``prefix``."""
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return InvalidArgument(f"{prefix}host", host, f"an address of this machine ({_why(error)})")
    kind = PortInUse if error.errno == errno.EADDRINUSE else InvalidArgument
    return kind(f"{prefix}port", port, f"a port that is free on {host} ({_why(error)})")


def _why(error: OSError) -> str:
    return error.strerror or str(error)
