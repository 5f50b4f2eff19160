"""The gRPC server: both services, health and reflection, on one port."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.access.authenticator import Authenticator
from server.access.listening import cannot_listen
from server.background import BackgroundTask
from server.calls.call_record import CallRecord
from server.errors import InvalidArgument
from server.rpc.control import ControlServicer
from server.rpc.generated.fathom.v1 import (
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)
from server.rpc.inference import InferenceServicer
from server.rpc.interceptors import CallInterceptor, Observer
from server.rpc.message_size import check_size
from server.rpc.reflection import enable_reflection
from server.rpc.tls import ServerTls
from server.serving.service import Service
from server.serving.service_state import State

INFERENCE: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL: str = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name

_INFERENCE_REQUESTS = {
    f"{INFERENCE}/{method.name}": method.input_type
    for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods
}
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """The server of a :class:`Service` in any state; health follows it."""

    def __init__(
        self,
        service: Service,
        host: str,
        port: int,
        *,
        max_message_bytes: int = 16 * 2**20,
        max_concurrent_streams: int | None = None,
        max_connection_age_seconds: float | None = None,
        tls: ServerTls | None = None,
        authenticator: Authenticator | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Prepare to listen on ``port``, 0 for any free one.

        Without ``tls`` connections are plain text; without ``authenticator`` anybody may call.
        ``observers`` are called with the record of each call at its end.
        """
        self._service = service
        self._host = host
        self._wanted_port = port
        self._tls = tls
        self._server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    authenticator or Authenticator(), [self.count, *observers], self._check_size
                )
            ],
            options=_options(max_message_bytes, max_concurrent_streams, max_connection_age_seconds),
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(service), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        enable_reflection([INFERENCE, CONTROL, health.SERVICE_NAME], self._server)
        self._following = BackgroundTask("the health report", self._follow)
        self._port = 0
        self._is_leaving = False

    @property
    def port(self) -> int:
        """The port that the server listens on, 0 before :meth:`start`."""
        return self._port

    async def start(self) -> None:
        """Listen.

        Raises :class:`InvalidArgument`, naming ``port`` or ``host``, if that is impossible.
        """
        _check_free(self._host, self._wanted_port)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            address = f"{host}:{self._wanted_port}"
            if self._tls is None:
                self._port = self._server.add_insecure_port(address)
            else:
                self._port = self._server.add_secure_port(address, self._tls.credentials)
        except RuntimeError:
            allowed = f"a port that gRPC can listen on at {self._host}"
            raise InvalidArgument("port", self._wanted_port, allowed) from None
        await self._health.set(CONTROL, _SERVING)
        await self._publish(self._service.is_healthy)
        await self._server.start()
        self._following.start()

    async def leave(self) -> None:
        """Turn health to NOT_SERVING, for good, while calls are still taken."""
        self._is_leaving = True
        await self._publish(self._service.is_healthy)

    def not_ready(self) -> str:
        """Return why health is NOT_SERVING; empty if it is SERVING."""
        if self._is_leaving:
            return "the server is being stopped"
        match self._service.state:
            case State.SERVING if self._service.is_healthy:
                return ""
            case State.SERVING:
                return "; ".join(self._service.status().problems)
            case State.STARTING:
                return f"the server is starting: {self._service.status().startup_phase}"
            case state:
                return f"the server is not serving: {state.value}"

    async def stop(self) -> None:
        """Tell watchers of health that nothing is served, and end all open calls.

        Call :meth:`Service.drain` before, to let requests finish.
        """
        await self._following.stop()
        await self._health.enter_graceful_shutdown()
        # Calls that watch health never end, so there is no point in waiting for open calls.
        await self._server.stop(_LAST_MESSAGES_SECONDS)

    def _check_size(self, method: str, data: bytes) -> None:
        if (message := _INFERENCE_REQUESTS.get(method)) is not None:
            check_size(data, message, self._service.model)

    def count(self, record: CallRecord) -> None:
        """Count a call that has ended in the metrics."""
        metrics = self._service.metrics
        metrics.count_request(record.method, record.depth, record.code)
        if record.served is not None:
            metrics.count_served(record.served.reason)

    async def _follow(self) -> None:
        is_healthy = self._service.is_healthy
        while True:
            await self._publish(is_healthy)
            is_healthy = await self._service.health_after(is_healthy)

    async def _publish(self, is_healthy: bool) -> None:
        status = _SERVING if is_healthy and not self._is_leaving else _NOT_SERVING
        for name in ("", INFERENCE):
            await self._health.set(name, status)


# Time for the last messages to reach the clients.
_LAST_MESSAGES_SECONDS = 0.1
# Calls that gRPC holds until the event loop takes them, some 16 KiB each. By default gRPC cancels
# some calls beyond a thousand, which a burst of streams reaches; admission refuses with a reason.
_MAX_PENDING_CALLS = 2**13
# The largest value of an option; gRPC takes it for no limit.
_MAX_INT = 2**31 - 1


def _options(
    max_message_bytes: int,
    max_concurrent_streams: int | None,
    max_connection_age_seconds: float | None,
) -> list[tuple[str, int]]:
    options = [
        # Otherwise a second server could listen on the port unnoticed, and get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
        # Pings notice clients whose machine is gone, so that their requests end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping as well, also during unary calls that send nothing for long.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]
    if max_concurrent_streams is not None:
        options.append(("grpc.max_concurrent_streams", max_concurrent_streams))
        # Otherwise calls count that have ended for the client but are not cleaned up yet, and the
        # next call, which has waited for them to end, is refused.
        options.append(("grpc.http.overload_protection", 0))
    if max_connection_age_seconds is not None:
        # Running calls are finished on the old connection: its grace has no limit.
        milliseconds = int(min(max_connection_age_seconds * 1000, _MAX_INT))
        options.append(("grpc.max_connection_age_ms", milliseconds))
    return options


def _check_free(host: str, port: int) -> None:
    """Raise :class:`InvalidArgument` if the address cannot be listened on.

    It listens for a moment, because gRPC's own error does not say what is wrong.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise cannot_listen(error, host, port) from None
