"""gRPC status codes of exceptions."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from server.errors import (
    DeadlineTooSoon,
    FailedPrecondition,
    FathomError,
    InvalidArgument,
    NonFiniteResult,
    Overloaded,
    PermissionDenied,
    RequestFailed,
    Unauthenticated,
    Unavailable,
    UnknownLevel,
)

CODES: dict[type[Exception], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownLevel: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineTooSoon: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    RequestFailed: grpc.StatusCode.ABORTED,
    NonFiniteResult: grpc.StatusCode.DATA_LOSS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}

# Status and message are sent as HTTP/2 headers, of which peers accept some 8 KiB.
_MAX_MESSAGE_CHARACTERS = 1024


def code_of(error: Exception) -> grpc.StatusCode:
    """Return the code of the nearest class of ``error`` in the table, else INTERNAL."""
    for cls in type(error).__mro__:
        if cls in CODES:
            return CODES[cls]
    return grpc.StatusCode.INTERNAL


def status_of(error: Exception) -> grpc.Status:
    """Return the status that a client is told, with the time to try again where that may help.

    The text of an error that is not a :class:`FathomError` is for the log alone.
    """
    code = code_of(error)
    message = str(error) if isinstance(error, FathomError) else "an error that the server logged"
    if len(message) > _MAX_MESSAGE_CHARACTERS:
        message = f"{message[: _MAX_MESSAGE_CHARACTERS - 3]}..."
    status = status_pb2.Status(code=code.value[0], message=message)
    if isinstance(error, Overloaded | Unavailable):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        detail = any_pb2.Any()
        detail.Pack(RetryInfo(retry_delay=delay))
        status.details.append(detail)
    return rpc_status.to_status(status)
