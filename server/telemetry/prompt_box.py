"""The prompt box of the operator's page: one prompt at one depth, over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from server.access.authenticator import bearer_token
from server.access.host_header import host_name, names_this_machine
from server.depth.depth_choice import DepthChoice, Layers, NamedLevel
from server.errors import (
    DeadlineTooSoon,
    FathomError,
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    RequestFailed,
    Unauthenticated,
    Unavailable,
    UnknownLevel,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

MAX_TOKENS = 256
_MAX_BODY_BYTES = 64 * 1024
# What is read of a larger body, so that its sender reads the answer.
_MAX_DISCARDED_BYTES = 1024 * 1024
_MAX_AT_A_TIME = 8
_DEADLINE_SECONDS = 120.0
_FIELDS = frozenset({"prompt", "depth", "max_tokens"})

_STATUSES: dict[type[FathomError], str] = {
    InvalidArgument: "400 Bad Request",
    UnknownLevel: "404 Not Found",
    Overloaded: "429 Too Many Requests",
    DeadlineTooSoon: "504 Gateway Timeout",
    Unavailable: "503 Service Unavailable",
    RequestFailed: "503 Service Unavailable",
    Unauthenticated: "401 Unauthorized",
    PermissionDenied: "403 Forbidden",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BoxRequest:
    """A prompt that the page sends; ``token`` is that of a client, None if none was given."""

    prompt: str
    depth: DepthChoice
    max_tokens: int
    token: str | None
    # The address of the caller's machine.
    address: str
    # The longest that the answer may take.
    timeout_seconds: float = _DEADLINE_SECONDS


@dataclass(frozen=True, slots=True)
class BoxBackend:
    """What runs the prompts; both functions are called in the event loop of the server.

    ``run`` returns what goes to the page as JSON, and raises :class:`FathomError`. ``describe``
    returns what the page needs to know of the model, and raises :class:`Unavailable`.
    """

    run: Callable[[BoxRequest], Coroutine[Any, Any, dict[str, object]]]
    describe: Callable[[], dict[str, object]]
    # Why the box is off; empty if it is on.
    problem: str = ""
    # Whether the name of the server in a request must be one of this machine.
    only_loopback: bool = True


class PromptBox:
    """Answers GET (is the box on, and what may be asked) and POST (run a prompt at a depth).

    Errors are one line of JSON. No header permits pages of other sites to read or to send
    anything: a request must be JSON, which browsers ask about first where a page of another site
    sends it, and must come from the page itself if the browser says where it comes from.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: BoxBackend) -> None:
        self._loop = loop
        self._backend = backend
        self._places = BoundedSemaphore(_MAX_AT_A_TIME)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request, in a thread of HTTP."""
        headers = [
            ("Content-Type", "application/json"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        try:
            self._check_origin(environ)
            match environ["REQUEST_METHOD"]:
                case "GET":
                    status, answer = "200 OK", self._description()
                case "POST":
                    status, answer = "200 OK", self._answer(environ)
                case _:
                    headers.append(("Allow", "GET, POST"))
                    raise _Refused("405 Method Not Allowed", "method: allowed: GET, POST")
        except _Refused as error:
            status, answer = error.status, {"error": str(error)}
        except FathomError as error:
            known = (_STATUSES[cls] for cls in type(error).__mro__ if cls in _STATUSES)
            status = next(known, "500 Internal Server Error")
            answer = {"error": " ".join(str(error).split())}
            if isinstance(error, Overloaded | Unavailable):
                headers.append(("Retry-After", str(max(1, round(error.retry_after)))))
            if isinstance(error, Unauthenticated):
                headers.append(("WWW-Authenticate", "Bearer"))
        except Exception:
            logger.exception("the prompt box failed")
            status = "500 Internal Server Error"
            answer = {"error": "an error that the server logged"}
        start_response(status, headers)
        return [f"{json.dumps(answer)}\n".encode()]

    def _check_origin(self, environ: WSGIEnvironment) -> None:
        """Refuse what pages of other sites send, also under a name that leads to this machine."""
        host = environ.get("HTTP_HOST", "")
        if self._backend.only_loopback and not names_this_machine(host_name(host)):
            allowed = "a name of this machine, such as localhost or 127.0.0.1"
            raise _Refused("403 Forbidden", f"Host: got {host[:80]!r}, allowed: {allowed}")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.partition("//")[2] != host:
            raise _Refused("403 Forbidden", f"Origin: got {origin[:80]!r}, allowed: this page")
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            raise _Refused("403 Forbidden", "Sec-Fetch-Site: allowed: same-origin")

    def _description(self) -> dict[str, object]:
        if self._backend.problem:
            return {"problem": self._backend.problem}

        async def described() -> dict[str, object]:
            return self._backend.describe()

        return {"problem": "", "max_tokens": MAX_TOKENS} | self._in_loop(described())

    def _answer(self, environ: WSGIEnvironment) -> dict[str, object]:
        body = _body(environ)
        if self._backend.problem:
            raise PermissionDenied(self._backend.problem)
        request = _request(body, environ)
        if not self._places.acquire(blocking=False):
            raise Overloaded(f"{_MAX_AT_A_TIME} prompts of this page run already", 1.0)
        try:
            return self._in_loop(self._backend.run(request))
        finally:
            self._places.release()

    def _in_loop(self, work: Coroutine[Any, Any, dict[str, object]]) -> dict[str, object]:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise Unavailable("the server has ended") from None
        try:
            return future.result(_DEADLINE_SECONDS + 5)
        except CancelledError:
            raise Unavailable("the server has ended") from None
        except TimeoutError:
            future.cancel()
            raise DeadlineTooSoon(f"no answer in {_DEADLINE_SECONDS:g} s") from None


class _Refused(Exception):
    """A request that is refused for how it was sent, with an HTTP status."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


def _body(environ: WSGIEnvironment) -> bytes:
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused("415 Unsupported Media Type", "Content-Type: allowed: application/json")
    text = environ.get("CONTENT_LENGTH") or ""
    if not (text.isascii() and text.isdigit()):
        raise _Refused("411 Length Required", "Content-Length: allowed: the number of bytes")
    length = int(text)
    if length > _MAX_BODY_BYTES:
        environ["wsgi.input"].read(min(length, _MAX_DISCARDED_BYTES))
        allowed = f"at most {_MAX_BODY_BYTES} bytes"
        raise _Refused("413 Content Too Large", f"request: got {length} bytes, allowed: {allowed}")
    body: bytes = environ["wsgi.input"].read(length)
    return body


def _request(body: bytes, environ: WSGIEnvironment) -> BoxRequest:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidArgument("request", "another text", "a JSON object") from None
    if not isinstance(fields, dict):
        raise InvalidArgument("request", type(fields).__name__, "a JSON object")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise InvalidArgument("request", unknown[0], ", ".join(sorted(_FIELDS)))
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidArgument("prompt", prompt, "a text")
    max_tokens = fields.get("max_tokens", 64)
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS:
        raise InvalidArgument("max_tokens", max_tokens, f"1 to {MAX_TOKENS}")
    return BoxRequest(
        prompt,
        _depth(fields.get("depth")),
        max_tokens,
        _token(environ.get("HTTP_AUTHORIZATION")),
        str(environ.get("REMOTE_ADDR", "")),
    )


def _depth(value: object) -> DepthChoice:
    if type(value) is int and 0 < value < 2**31:
        return Layers(value)
    if isinstance(value, str) and value:
        return NamedLevel(value)
    raise InvalidArgument("depth", value, "a number of layers, or the name of a level")


def _token(header: str | None) -> str | None:
    return None if header is None else bearer_token(header)
