"""Follows a server's health over the standard protocol."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.running_server import until


class Watcher:
    """Collects the statuses that ``Watch`` tells, from before the server listens to its end."""

    def __init__(self, address: str, service: str = "") -> None:
        self.statuses: list[str] = []
        # When each came, on the monotonic clock.
        self.times: list[float] = []
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.max_reconnect_backoff_ms", 200)]
        )
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = stub.Watch(request, wait_for_ready=True)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()

    def wait_for(self, *statuses: str) -> None:
        """Wait until exactly these statuses have been seen, in this order."""
        until(lambda: self.statuses == [*statuses], lambda: f"seen: {self.statuses}")

    def _follow(self) -> None:
        try:
            for response in self._call:
                name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
                self.times.append(time.monotonic())
                self.statuses.append(name)
        except grpc.RpcError:
            pass  # the server's end, or the test's
