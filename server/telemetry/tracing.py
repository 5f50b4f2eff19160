"""OpenTelemetry traces of calls; OpenTelemetry is imported only if traces are on.

Each call of Fathom's own services is a span, with the attributes of the semantic conventions for
generative AI and for RPC. No attribute holds text of a client.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from server.calls.call_record import CallRecord
from server.errors import InvalidArgument

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

_ENDPOINTS = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
_PACKAGES = "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc"
_CLOSE_SECONDS = 5.0
# Status codes that the conventions for gRPC count as a fault of the server.
_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

Attribute = str | bool | int | float | list[str]


def open_tracing(
    endpoint: str | None, version: str, environ: Mapping[str, str] = os.environ
) -> Tracing | None:
    """Return the tracing to ``endpoint``, or else to where ``OTEL_*`` variables say, or else None.

    Raises :class:`InvalidArgument` if ``endpoint`` is given and OpenTelemetry is not installed.
    """
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    found = endpoint or next((environ[name] for name in _ENDPOINTS if environ.get(name)), None)
    if found is None or is_off or environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    if not _is_installed():
        allowed = "none, unless the extra otel is installed: pip install 'fathom-server[otel]'"
        if endpoint is not None:
            raise InvalidArgument("otlp_endpoint", endpoint, allowed)
        logger.warning("%s is set, but there are no traces without the extra otel", _ENDPOINTS[1])
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    # Everything else, such as headers and certificates, is read from OTEL_* variables.
    return Tracing(OTLPSpanExporter(endpoint=endpoint), version)


class Tracing:
    """Makes a span of every call at its end, and sends spans in batches, in a thread.

    Sampling, resource and batches follow the ``OTEL_*`` variables.
    """

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "fathom", "service.version": version})
        if name := os.environ.get("OTEL_SERVICE_NAME"):
            resource = resource.merge(Resource({"service.name": name}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fathom", version)
        self._propagator = TraceContextTextMapPropagator()

    def observer(self, model: Callable[[], str]) -> Callable[[CallRecord], None]:
        """Return a function to call with the record of each call.

        ``model`` returns the name of the model, or an empty string before it is loaded.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        def observe(record: CallRecord) -> None:
            name = model()
            attributes = span_attributes(record, name)
            operation = attributes.get("gen_ai.operation.name")
            span = self._tracer.start_span(
                f"{operation} {name}" if operation else record.method,
                context=self._propagator.extract(record.trace_headers),
                kind=SpanKind.SERVER,
                attributes=attributes,
                start_time=record.arrived_at,
            )
            if record.code in _SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR))
            span.end(end_time=record.arrived_at + int(record.total * 1e9))

        return observe

    def close(self) -> None:
        """Send the remaining spans, waiting at most 5 s for the collector."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_CLOSE_SECONDS)


def span_attributes(record: CallRecord, model: str) -> dict[str, Attribute]:
    """Return the attributes of the span of a call, by the names of the semantic conventions."""
    host, _, port = record.caller.peer.rpartition(":")
    attributes: dict[str, Attribute | None] = {
        **_transport(record),
        "error.type": None if record.code == "OK" else record.code,
        "client.address": host.strip("[]") or None,
        "client.port": int(port) if port.isdigit() else None,
        "enduser.id": record.caller.client or None,
    }
    if record.served is not None:
        attributes |= {
            "fathom.prefill_layers": record.served.prefill_layers,
            "fathom.decode_layers": record.served.decode_layers,
            "fathom.served": record.served.reason.value,
            "fathom.stand_in": record.served.stand_in_name,
        }
    if (sampling := record.sampling) is not None:
        attributes |= {
            "gen_ai.operation.name": "chat" if record.is_chat else "text_completion",
            "gen_ai.provider.name": "fathom",
            "gen_ai.output.type": "text",
            "gen_ai.request.model": model or None,
            "gen_ai.request.stream": (
                record.method.endswith("Stream") if record.is_stream is None else record.is_stream
            ),
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.response.id": record.request_id or None,
            "gen_ai.response.model": None if record.served is None else model or None,
            "gen_ai.response.time_to_first_chunk": record.time_to_first_token,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        }
        if record.served is not None:
            attributes["gen_ai.usage.output_tokens"] = record.num_generated_tokens
        if record.finish_reason is not None:
            attributes["gen_ai.response.finish_reasons"] = [record.finish_reason.value]
    return {name: value for name, value in attributes.items() if value is not None}


def _transport(record: CallRecord) -> dict[str, Attribute | None]:
    method, is_http, path = record.method.partition(" ")
    if is_http:
        return {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": record.http_status,
        }
    return {
        "rpc.system.name": "grpc",
        "rpc.method": method,
        "rpc.response.status_code": record.code,
    }


def _is_installed() -> bool:
    try:
        return all(importlib.util.find_spec(package) is not None for package in _PACKAGES)
    except ModuleNotFoundError:
        return False
