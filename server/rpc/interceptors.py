"""What every call goes through: status codes and the count of calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from server.caller import Caller, set_caller
from server.errors import InvalidArgument
from server.metrics import Metrics
from server.policy import ServedDepth
from server.rpc.peer import host_of, peer_address
from server.rpc.status import code_of, status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Awaitable[Any]]

# A client's deadline cancels the call a moment before the server's copy of it runs out: the
# copy is rounded up, and starts when the call arrives.
_DEADLINE_SLACK = 0.02
_DEADLINE_SLACK_SECONDS = 0.05


@dataclass(slots=True)
class _Call:
    depth: str = ""


_call: ContextVar[_Call] = ContextVar("call")


def note_depth(served: ServedDepth) -> None:
    """Let the present call be counted under its depth."""
    _call.get().depth = str(served.decode_layers)


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands in for a request that is no message of its type."""

    problem: str


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions into status codes and counts the calls of the project's own services."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        # Handlers of unknown methods are None; health and reflection answer for themselves.
        if handler is None or not method.startswith("fathom.v1."):
            return handler
        behavior: Any
        if handler.response_streaming:
            behavior, make_handler = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            behavior, make_handler = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        return make_handler(
            self._wrapped(behavior, method),
            request_deserializer=_forgiving(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrapped(self, behavior: Behavior, method: str) -> Any:
        async def wrapped(request: Any, context: Context) -> Any:
            call = _Call()
            _call.set(call)
            peer = peer_address(context.peer())
            set_caller(Caller(client=host_of(peer), peer=peer))
            timeout = context.time_remaining()
            try:
                if isinstance(request, _Undecodable):
                    allowed = f"the request message of {method}, with strings in UTF-8"
                    raise InvalidArgument("request", request.problem, allowed)
                response = await behavior(request, context)
            except (asyncio.CancelledError, grpc.aio.InternalError) as error:
                # InternalError is what a message gets that is on its way when the call ends.
                code = _code_of_cancellation(timeout, context.time_remaining())
                self._metrics.count_request(method, call.depth, code.name)
                raise asyncio.CancelledError from error
            except Exception as error:
                code = code_of(error)
                self._metrics.count_request(method, call.depth, code.name)
                if code is grpc.StatusCode.INTERNAL:
                    logger.exception("%s failed", method)
                status = status_of(error)
                await context.abort(status.code, status.details, status.trailing_metadata)
            self._metrics.count_request(method, call.depth, grpc.StatusCode.OK.name)
            return response

        return wrapped


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Leave a message that cannot be decoded to the handler: gRPC would answer UNKNOWN."""
    assert deserialize is not None

    def forgiving(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return forgiving


def _code_of_cancellation(timeout: float | None, remaining: float | None) -> grpc.StatusCode:
    """Return whether the client's deadline or the client itself ended the call."""
    if timeout is None or remaining is None:
        return grpc.StatusCode.CANCELLED
    if remaining <= max(_DEADLINE_SLACK_SECONDS, _DEADLINE_SLACK * timeout):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
