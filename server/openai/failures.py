"""HTTP statuses of exceptions, and the bodies that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

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


class UnknownModel(FathomError):
    """A request names a model that is not served."""

    def __init__(self, name: str, base: str) -> None:
        super().__init__(
            f"no model {name[:80]!r}; the model is {base}, also at a depth: {base}:LEVEL, "
            f"{base}@LAYERS, {base}:auto"
        )


class UnknownRoute(FathomError):
    """There is no such path."""


class WrongMethod(FathomError):
    """The path exists, but not with this method."""


class TooLarge(FathomError):
    """The body is larger than the server accepts."""


class WrongMediaType(FathomError):
    """The body is not JSON."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What an exception is to a client.

    ``code`` is the name of gRPC's status for the same exception, for metrics, logs and traces.
    """

    status: int
    type: str
    code: str


FAILURES: dict[type[Exception], Failure] = {
    InvalidArgument: Failure(400, "invalid_request_error", "INVALID_ARGUMENT"),
    FailedPrecondition: Failure(400, "invalid_request_error", "FAILED_PRECONDITION"),
    Unauthenticated: Failure(401, "authentication_error", "UNAUTHENTICATED"),
    PermissionDenied: Failure(403, "permission_error", "PERMISSION_DENIED"),
    UnknownLevel: Failure(404, "not_found_error", "NOT_FOUND"),
    UnknownModel: Failure(404, "not_found_error", "NOT_FOUND"),
    UnknownRoute: Failure(404, "not_found_error", "UNIMPLEMENTED"),
    WrongMethod: Failure(405, "invalid_request_error", "UNIMPLEMENTED"),
    TooLarge: Failure(413, "invalid_request_error", "INVALID_ARGUMENT"),
    WrongMediaType: Failure(415, "invalid_request_error", "INVALID_ARGUMENT"),
    Overloaded: Failure(429, "rate_limit_error", "RESOURCE_EXHAUSTED"),
    NonFiniteResult: Failure(500, "server_error", "DATA_LOSS"),
    RequestFailed: Failure(500, "server_error", "ABORTED"),
    Unavailable: Failure(503, "service_unavailable_error", "UNAVAILABLE"),
    DeadlineTooSoon: Failure(504, "timeout_error", "DEADLINE_EXCEEDED"),
}
_UNEXPECTED = Failure(500, "server_error", "INTERNAL")
# Fields of the service by the names that they have in OpenAI's API.
_FIELDS = {
    "chat.messages": "messages",
    "depth.layers": "depth",
    "depth.prune_ratio": "depth",
    "depth.auto.max_quality_loss": "max_quality_loss",
    "prefill_depth.layers": "prefill_depth",
    "prefill_depth.prune_ratio": "prefill_depth",
    "token_ids.ids": "prompt",
    "structure": "structured_outputs",
    "text": "prompt",
}
_PREFIXES = "sampling.", "stop.", "output."


def failure_of(error: BaseException) -> Failure:
    """Return what the nearest class of ``error`` in the table is to a client."""
    for cls in type(error).__mro__:
        if cls in FAILURES:
            return FAILURES[cls]
    return _UNEXPECTED


def renamed(error: InvalidArgument) -> InvalidArgument:
    """Return the error with the field's name in OpenAI's API."""
    field = error.field
    for inner, outer in _FIELDS.items():
        if field == inner or field.startswith((f"{inner}[", f"{inner}.")):
            field = outer + field[len(inner) :]
            break
    else:
        for prefix in _PREFIXES:
            field = field.removeprefix(prefix)
    return InvalidArgument(field, error.value, error.allowed)


def error_body(error: BaseException) -> dict[str, Any]:
    """Return what clients read of an error; one that is no FathomError is for the log alone."""
    failure = failure_of(error)
    message, field = "an error that the server logged", None
    if isinstance(error, InvalidArgument):
        error = renamed(error)
        field = error.field
    if isinstance(error, FathomError):
        message = str(error)
    return {
        "error": {
            "message": message,
            "type": failure.type,
            "param": field,
            "code": failure.status,
        }
    }


def error_response(error: BaseException) -> JSONResponse:
    """Return the answer to a request that ends with ``error`` before its first byte."""
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        # OpenAI's clients wait for that long, and then try again.
        headers["retry-after"] = str(max(1, round(error.retry_after)))
        headers["retry-after-ms"] = str(int(error.retry_after * 1000))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, TooLarge):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error_body(error), failure_of(error).status, headers)
