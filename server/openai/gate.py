"""What every request over HTTP passes first: who calls, what it may send, what is noted of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.authenticator import Authenticator, bearer_token
from server.access.clients import Permission
from server.access.host_header import host_name, names_this_machine
from server.calls.call_record import CallRecord, set_current_call
from server.calls.caller import Caller, set_caller
from server.errors import FathomError, InvalidArgument, PermissionDenied, Unauthenticated
from server.openai.failures import (
    TooLarge,
    UnknownRoute,
    WrongMediaType,
    WrongMethod,
    error_response,
    failure_of,
)
from server.openai.peer_certificate import CERTIFICATE_NAMES

Observer = Callable[[CallRecord], None]

_TRACE_HEADERS = "traceparent", "tracestate", "baggage"
_CANCELLED = "CANCELLED"
_MAX_DISCARDED_BYTES = 4 * 2**20

logger = logging.getLogger(__name__)


class Gate:
    """Authenticates callers, reads bodies, and tells observers of each request at its end.

    A client that disconnects ends its request. Errors before the first byte have their status.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        observers: Sequence[Observer],
        *,
        paths: Collection[str],
        max_body_bytes: int,
        only_loopback: bool,
    ) -> None:
        """``observers`` are told of requests to ``paths`` alone: others are not the API's."""
        self._app = app
        self._authenticator = authenticator
        self._observers = observers
        self._paths = paths
        self._max_body_bytes = max_body_bytes
        self._only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        record = CallRecord(self._method(scope))
        set_current_call(record)
        exchange = _Exchange(send)
        code = "OK"
        try:
            self._admit(scope, record)
            body = await self._body(scope, receive)
            if body is None or not await _while_connected(
                self._app(scope, _replay(body), exchange.send), receive
            ):
                code = _CANCELLED
            elif record.late_error is not None:
                code = failure_of(record.late_error).code
        except asyncio.CancelledError:
            code = _CANCELLED
            raise
        except Exception as error:
            error = _known(error)
            code = failure_of(error).code
            if isinstance(error, InvalidArgument):
                record.refused_field = error.field
            if not isinstance(error, FathomError):
                logger.exception("%s failed", record.method)
            if exchange.status is None:
                await error_response(error)(scope, receive, exchange.send)
        finally:
            record.http_status = exchange.status
            record.end(code)
            if record.method:
                for observer in self._observers:
                    observer(record)

    def _method(self, scope: Scope) -> str:
        path: str = scope["path"]
        if path.startswith("/v1/models/"):
            path = "/v1/models"
        return f"{scope['method']} {path}" if path in self._paths else ""

    def _admit(self, scope: Scope, record: CallRecord) -> None:
        """Find out who calls; raise :class:`FathomError` for a caller who may not."""
        headers = Headers(scope=scope)
        address, port = scope.get("client") or ("", 0)
        peer = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        record.caller = Caller(client=address, peer=peer)
        record.trace_headers = {name: headers[name] for name in _TRACE_HEADERS if name in headers}
        host = headers.get("host", "")
        if self._only_loopback and not names_this_machine(host_name(host)):
            allowed = "a name of this machine, such as localhost or 127.0.0.1"
            raise PermissionDenied(f"host: got {host[:80]!r}, allowed: {allowed}")
        client = self._authenticator.identify(
            lambda: _token(headers), scope.get("state", {}).get(CERTIFICATE_NAMES, ())
        )
        if client is not None:
            record.caller = Caller(client=client.name, peer=peer, is_known=True)
        self._authenticator.require(Permission.INFERENCE, client)
        set_caller(record.caller)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None for a client that has gone before its end."""
        if scope["method"] != "POST":
            return b""
        headers = Headers(scope=scope)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Browsers ask first where a page of another site sends it.
            raise WrongMediaType("content-type: allowed: application/json")
        limit = self._max_body_bytes
        announced = int(headers.get("content-length") or 0)
        data, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if max(size, announced) <= limit:
                data += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            # Who still sends would not read the answer: a little more than the limit is read.
            if size > limit + _MAX_DISCARDED_BYTES or (
                is_complete and max(size, announced) > limit
            ):
                raise TooLarge(f"body: got {max(size, announced)} bytes, allowed: {limit}")
            if is_complete:
                return bytes(data)


class _Exchange:
    """Sends an answer, and remembers its status; None: nothing has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


async def _while_connected(work: Any, receive: Receive) -> bool:
    """Run ``work``; return whether the client has waited for its end."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _replay(body: bytes) -> Receive:
    """Return what gives the body once; the disconnect is watched for elsewhere."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")
        return message

    return receive


def _token(headers: Headers) -> str | None:
    values = headers.getlist("authorization")
    if not values:
        return None
    if len(values) > 1:
        raise Unauthenticated("authorization: allowed: Bearer with a token, once")
    return bearer_token(values[0])


def _known(error: Exception) -> Exception:
    """Return the error, or what Starlette means by it."""
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            return WrongMethod("method: not for this path")
        if error.status_code == 404:
            return UnknownRoute("no such path")
    return error
