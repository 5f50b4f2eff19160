"""TLS of the server: a new connection uses the certificates that are in force at that time."""

from __future__ import annotations

import grpc

from server.access.certificates import Certificates


class ServerTls:
    """The server's credentials; open connections keep their certificates when new ones come."""

    def __init__(self, certificates: Certificates) -> None:
        self._configuration = _configuration(certificates)
        self.requires_client_certificates = certificates.client_ca is not None
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._configuration,
            lambda: self._configuration,  # called in gRPC's threads, for every handshake
            require_client_authentication=self.requires_client_certificates,
        )

    def install(self, certificates: Certificates) -> None:
        """Use these for new connections."""
        self._configuration = _configuration(certificates)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.client_ca
    )
