"""The interceptor of all calls: authentication, status codes, and records of calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health

from server.access.authenticator import Authenticator
from server.access.clients import Permission
from server.calls.call_record import CallRecord, set_current_call
from server.calls.caller import set_caller
from server.errors import InvalidArgument
from server.rpc.authentication import caller_of, client_of
from server.rpc.reflection import SERVICE_NAMES as REFLECTION
from server.rpc.status import code_of, status_of

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Awaitable[Any]]
# A function that is called with the record of each call of Fathom's own services, at its end.
Observer = Callable[[CallRecord], None]
# Raises an error for a method's request that is not to be decoded.
CheckSize = Callable[[str, bytes], None]

# A client's deadline cancels the call a moment before the server's copy of the deadline passes: the
# copy is rounded up, and counts from the arrival of the call. As a share of the timeout:
_DEADLINE_SLACK_RATIO = 0.02
_DEADLINE_SLACK_SECONDS = 0.05

_PERMISSIONS = {
    "fathom.v1.Inference": Permission.INFERENCE,
    "fathom.v1.Control": Permission.CONTROL,
}
_TRACE_HEADERS = frozenset({"traceparent", "tracestate", "baggage"})


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates callers, turns exceptions into status codes, and tells observers.

    The health service is open to anybody, because probes have no token.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        observers: Sequence[Observer],
        check_size: CheckSize = lambda method, data: None,
    ) -> None:
        self._authenticator = authenticator
        self._observers = observers
        self._check_size = check_size

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        service = method.partition("/")[0]
        if handler is None or service == health.SERVICE_NAME:  # None: there is no such method
            return handler
        if service in REFLECTION:
            return self._guarded(handler)
        behavior: Any
        if handler.response_streaming:
            behavior, make_handler = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            behavior, make_handler = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        # Messages are decoded after authentication, with a clearer error than gRPC's own.
        return make_handler(
            self._wrapped(behavior, handler.request_deserializer, method, _PERMISSIONS[service]),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a stream, open to every known client."""

        async def guarded(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                client_of(self._authenticator, context)
            except Exception as error:
                await _abort(context, error)
            behavior: Any = handler.stream_stream
            async for response in behavior(requests, context):
                yield response

        make_handler: Any = grpc.stream_stream_rpc_method_handler
        guarded_handler: grpc.RpcMethodHandler[Any, Any] = make_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return guarded_handler

    def _wrapped(
        self,
        behavior: Behavior,
        deserialize: Callable[[bytes], Any] | None,
        method: str,
        permission: Permission,
    ) -> Any:
        assert deserialize is not None

        async def wrapped(data: bytes, context: Context) -> Any:
            record = CallRecord(method)
            record.trace_headers = _trace_headers(context)
            set_current_call(record)
            timeout = context.time_remaining()
            try:
                record.caller = caller_of(context, None)
                client = client_of(self._authenticator, context)
                record.caller = caller_of(context, client)
                self._authenticator.require(permission, client)
                set_caller(record.caller)
                self._check_size(method, data)
                message = _decoded(data, deserialize, method)
                del data  # or it would be held as long as the call
                response = await behavior(message, context)
            except (asyncio.CancelledError, grpc.aio.InternalError) as error:
                # gRPC raises InternalError if the call ends while a message is being sent.
                code = _code_of_cancellation(timeout, context.time_remaining())
                self._end(record, code)
                raise asyncio.CancelledError from error
            except Exception as error:
                code = code_of(error)
                if isinstance(error, InvalidArgument):
                    record.refused_field = error.field
                self._end(record, code)
                if code is grpc.StatusCode.INTERNAL:
                    logger.exception("%s failed", method)
                await _abort(context, error)
            self._end(record, grpc.StatusCode.OK)
            return response

        return wrapped

    def _end(self, record: CallRecord, code: grpc.StatusCode) -> None:
        record.end(code.name)
        for observer in self._observers:
            observer(record)


async def _abort(context: Context, error: Exception) -> None:
    status = status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _decoded(data: bytes, deserialize: Callable[[bytes], Any], method: str) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        # gRPC would answer UNKNOWN.
        allowed = f"the request message of {method}, with strings in UTF-8"
        raise InvalidArgument("request", str(error), allowed) from error


def _trace_headers(context: Context) -> dict[str, str]:
    return {
        key: value
        for key, value in context.invocation_metadata() or ()
        if key in _TRACE_HEADERS and isinstance(value, str)
    }


def _code_of_cancellation(timeout: float | None, remaining: float | None) -> grpc.StatusCode:
    """Return DEADLINE_EXCEEDED if the client's deadline ended the call, else CANCELLED."""
    if timeout is None or remaining is None:
        return grpc.StatusCode.CANCELLED
    if remaining <= max(_DEADLINE_SLACK_SECONDS, _DEADLINE_SLACK_RATIO * timeout):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED
