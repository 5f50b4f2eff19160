"""TLS of the HTTP server: a new connection uses the certificates in force at that time."""

from __future__ import annotations

import os
import ssl
from typing import Any

from server.access.certificates import Certificates


class HttpTls:
    """The context of new connections; open ones keep their certificates when new ones come."""

    def __init__(self, certificates: Certificates) -> None:
        self._current = _context(certificates)
        # What listens keeps this one, and each connection is given the present one.
        self.context = _context(certificates)
        self.context.sni_callback = self._choose

    def install(self, certificates: Certificates) -> None:
        """Use these for new connections."""
        self._current = _context(certificates)

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current


def _context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    # Python reads them from a file alone; this one is in memory.
    file = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(file, certificates.key + b"\n" + certificates.chain)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    if certificates.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=certificates.client_ca.decode("ascii", "ignore"))
    return context
