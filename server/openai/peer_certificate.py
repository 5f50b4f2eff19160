"""Names in the certificate of a client, on its way from the connection to its requests."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# The key among the state of a request.
CERTIFICATE_NAMES = "certificate_names"


class CertificateProtocol(HttpToolsProtocol):
    """uvicorn's connection, which tells its requests whose certificate it has verified."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        names = names_in(transport.get_extra_info("peercert") or {})
        self.app_state = {**self.app_state, CERTIFICATE_NAMES: names}
        super().connection_made(transport)


def names_in(certificate: dict[str, Any]) -> tuple[str, ...]:
    """Return the common name and the alternative names, as gRPC lists them.

    ``certificate`` is what :meth:`ssl.SSLSocket.getpeercert` returns.
    """
    common = [
        value
        for entry in certificate.get("subject", ())
        for name, value in entry
        if name == "commonName"
    ]
    return (*common, *(value for _, value in certificate.get("subjectAltName", ())))
