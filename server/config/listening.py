"""Settings of addresses, TLS, clients and connections."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, BeforeValidator, Field, FilePath, model_validator
from pydantic_settings import NoDecode

from server.config.errors import conflict
from server.config.values import names_from

Port = Annotated[int, Ge(0), Le(65535)]


class ListeningSettings(BaseModel):
    host: str = Field("127.0.0.1", description="Address that gRPC listens on.", min_length=1)
    port: Port = Field(50051, description="Port of gRPC; 0: any free one.")
    http_port: Port | None = Field(
        None,
        description="Port of OpenAI's API over HTTP, at the address of gRPC and with its TLS and "
        "clients; 0: any free one. None: no such API.",
    )
    http_allow_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(names_from)] = Field(
        (),
        description="Origins, such as `https://chat.example.org`, whose pages may call OpenAI's "
        "API from a browser.",
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address that the metrics listen on.", min_length=1
    )
    metrics_port: Port = Field(9090, description="Port of the metrics; 0: any free one.")
    tls_certificate: FilePath | None = Field(
        None,
        description="Certificate of the server in PEM, with those between it and its authority; "
        "none: plain text.",
    )
    tls_key: FilePath | None = Field(None, description="Key of that certificate, in PEM.")
    tls_client_ca: FilePath | None = Field(
        None,
        description="Authorities in PEM, one of which must have signed every client's "
        "certificate; none: clients need none.",
    )
    clients: FilePath | None = Field(
        None, description="File of the clients that may call; none: anybody."
    )
    allow_plaintext: bool = Field(
        False, description="Whether to listen beyond this machine without TLS."
    )
    allow_anonymous: bool = Field(
        False, description="Whether to listen beyond this machine without knowing the clients."
    )
    anonymous_control: Literal["loopback", "always", "never"] = Field(
        "loopback",
        description="Whether callers may use Control where no clients are known: loopback: where "
        "'host' can be reached from this machine alone.",
    )
    page_prompts: Literal["loopback", "always", "never"] = Field(
        "loopback",
        description="Whether the page on the port of the metrics runs prompts, for callers that "
        "may use Inference; loopback: where 'metrics_host' can be reached from this machine alone.",
    )
    max_message_bytes: Annotated[int, Ge(1024), Le(2**31 - 1)] | None = Field(
        None,
        description="Largest gRPC message, and largest body of a request over HTTP, that is "
        "accepted. None: 128 bytes for each token of "
        "the context, 4 MiB at least.",
    )
    max_streams_per_connection: Annotated[int, Ge(1), Le(2**31 - 1)] = Field(
        1024, description="Calls that run on one connection at most; others wait in the client."
    )
    max_connection_seconds: Annotated[float, Ge(1)] | None = Field(
        None,
        description="Age at which clients are asked to connect anew, so that they spread over "
        "servers; calls that run are finished. None: no limit.",
    )

    @model_validator(mode="after")
    def _check_ports(self) -> ListeningSettings:
        if self.port and (self.host, self.port) == (self.metrics_host, self.metrics_port):
            raise conflict("metrics_port", str(self.metrics_port), "another port than 'port' has")
        if self.http_port:
            if self.http_port == self.port:
                raise conflict("http_port", str(self.http_port), "another port than 'port' has")
            if (self.host, self.http_port) == (self.metrics_host, self.metrics_port):
                allowed = "another port than 'metrics_port' has"
                raise conflict("http_port", str(self.http_port), allowed)
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> ListeningSettings:
        for name, other in (
            ("tls_certificate", "tls_key"),
            ("tls_key", "tls_certificate"),
            ("tls_client_ca", "tls_certificate"),
        ):
            path = getattr(self, name)
            if path is not None and getattr(self, other) is None:
                raise conflict(name, repr(str(path)), f"none without {other}")
        return self
