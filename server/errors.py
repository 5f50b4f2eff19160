"""Errors that clients are told about, whatever transport reports them."""

from __future__ import annotations

from pathlib import Path

# Characters of a value that an error repeats.
_MAX_CHARACTERS, _MAX_PATH_CHARACTERS = 80, 1024


class FathomError(Exception):
    """Base class of the errors that clients are told about."""


class InvalidArgument(FathomError):
    """A field of a request or a setting has a value that is not allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field}: got {_shortened(value)}, allowed: {allowed}")


class UnknownLevel(FathomError):
    """A request names a level that the server does not have."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name = name
        self.known = known
        super().__init__(f"no level {_shortened(name)}; the levels are {', '.join(known)}")


class Overloaded(FathomError):
    """The queue is full; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class DeadlineTooSoon(FathomError):
    """The deadline of a request passes before the request could start."""


class Unavailable(FathomError):
    """The server is starting or draining, or its engine is down; try again or ask another server.

    ``retry_after`` is in seconds.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class RequestFailed(FathomError):
    """The engine has given up one request; others run on, and trying again may help."""


class NonFiniteResult(FathomError):
    """The model has computed something that is not a finite number.

    ``depth`` says at which depth, in words such as "depth 8".
    """

    def __init__(self, depth: str) -> None:
        self.depth = depth
        super().__init__(
            f"at {depth} the model computes values that are not finite numbers: its weights are "
            "damaged, or beyond the range of the dtype"
        )


class FailedPrecondition(FathomError):
    """The request is valid, but the server cannot do it in its present state."""


class Unauthenticated(FathomError):
    """The server does not know the caller."""


class PermissionDenied(FathomError):
    """The caller is known but lacks the permission."""


def _shortened(value: object) -> str:
    # A path that is cut says nothing: its end is what tells it from others.
    is_path = isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~")))
    limit = _MAX_PATH_CHARACTERS if is_path else _MAX_CHARACTERS
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
