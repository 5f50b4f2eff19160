"""Clients of a Fathom server, blocking and asynchronous."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from server.rpc.client_tls import ClientTls
from server.rpc.generated.fathom.v1 import (
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

T = TypeVar("T")

# Replies with the log-probabilities of many tokens are larger than gRPC's default limit, 4 MiB.
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class CallError(Exception):
    """A call that failed; ``code`` is the name of its status code.

    ``retry_after`` is the number of seconds after which to try again, None if the server did not
    say.
    """

    def __init__(self, code: str, message: str, retry_after: float | None) -> None:
        self.code = code
        self.message = message
        self.retry_after = retry_after
        super().__init__(f"{code}: {message}")


class Client:
    """A client that waits for each answer; every method raises :class:`CallError`.

    ``timeout`` is in seconds, None for no limit. Without ``tls`` nothing is encrypted, not even
    the token.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = None,
        tls: ClientTls | None = None,
        token: str | None = None,
    ) -> None:
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(
                address, tls.credentials, options=[*_OPTIONS, *tls.options]
            )
        self._metadata = token_metadata(token)
        self._timeout = timeout
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._control: Any = control_pb2_grpc.ControlStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls that are still open."""
        self._channel.close()

    def generate(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        return self._unary(self._inference.Generate, request, inference_pb2.GenerateResponse)

    def generate_stream(
        self, request: inference_pb2.GenerateRequest
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        """Yield the messages as they come; closing the iterator cancels the request."""
        return self._stream(self._inference.GenerateStream, request)

    def score(self, request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        return self._unary(self._inference.Score, request, inference_pb2.ScoreResponse)

    def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        return self._unary(self._inference.Tokenize, request, inference_pb2.TokenizeResponse)

    def get_model(self) -> inference_pb2.Model:
        request = inference_pb2.GetModelRequest()
        return self._unary(self._inference.GetModel, request, inference_pb2.GetModelResponse).model

    def get_plan(self) -> control_pb2.GetPlanResponse:
        return self._unary(
            self._control.GetPlan, control_pb2.GetPlanRequest(), control_pb2.GetPlanResponse
        )

    def calibrate(
        self, request: control_pb2.CalibrateRequest
    ) -> Iterator[control_pb2.CalibrateResponse]:
        """Yield progress, then the new plan; closing the iterator earlier keeps the old plan."""
        return self._stream(self._control.Calibrate, request)

    def set_levels(self, request: control_pb2.SetLevelsRequest) -> control_pb2.SetLevelsResponse:
        return self._unary(self._control.SetLevels, request, control_pb2.SetLevelsResponse)

    def set_policy(self, request: control_pb2.SetPolicyRequest) -> control_pb2.SetPolicyResponse:
        return self._unary(self._control.SetPolicy, request, control_pb2.SetPolicyResponse)

    def get_status(self) -> control_pb2.GetStatusResponse:
        return self._unary(
            self._control.GetStatus, control_pb2.GetStatusRequest(), control_pb2.GetStatusResponse
        )

    def drain(self, request: control_pb2.DrainRequest) -> control_pb2.DrainResponse:
        return self._unary(self._control.Drain, request, control_pb2.DrainResponse)

    def resume(self) -> control_pb2.ResumeResponse:
        return self._unary(
            self._control.Resume, control_pb2.ResumeRequest(), control_pb2.ResumeResponse
        )

    def health(self, service: str = "") -> str:
        """Return ``SERVING`` or ``NOT_SERVING``."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._unary(self._health.Check, request, health_pb2.HealthCheckResponse)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def _unary(self, call: Callable[..., Any], request: object, reply: type[T]) -> T:
        try:
            response = call(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _call_error(error) from None
        assert isinstance(response, reply)
        return response

    def _stream(self, call: Callable[..., Any], request: object) -> Iterator[Any]:
        responses = call(request, timeout=self._timeout, metadata=self._metadata)
        try:
            yield from responses
        except grpc.RpcError as error:
            raise _call_error(error) from None
        finally:
            responses.cancel()


class AsyncClient:
    """The stubs of a server, for use with asyncio; close it when done.

    The token goes into the metadata of each call: see :func:`token_metadata`.
    """

    def __init__(self, address: str, *, tls: ClientTls | None = None) -> None:
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                address, tls.credentials, options=[*_OPTIONS, *tls.options]
            )
        self.inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self.control: Any = control_pb2_grpc.ControlStub(self._channel)
        self.health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls that are still open."""
        await self._channel.close()


def retry_delay(call: grpc.Call | grpc.aio.AioRpcError) -> float | None:
    """Return after how many seconds to try a failed call again, None if the server did not say."""
    # The type stubs allow only grpc.Call here, but code, details and metadata are all that is used.
    status = rpc_status.from_call(cast("grpc.Call", call))
    for detail in status.details if status is not None else ():
        info = RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToNanoseconds() / 1e9)
    return None


def token_metadata(token: str | None) -> list[tuple[str, str]]:
    """Return the metadata that a token travels as."""
    return [] if token is None else [("authorization", f"Bearer {token}")]


def _call_error(error: grpc.RpcError) -> CallError:
    # The error that a stub raises is also the call, though its base class does not say so.
    assert isinstance(error, grpc.Call)
    return CallError(error.code().name, error.details() or "", retry_delay(error))
