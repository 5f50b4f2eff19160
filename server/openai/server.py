"""The HTTP server of OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.authenticator import Authenticator
from server.access.listening import cannot_listen
from server.engine.base import RunsVllm
from server.errors import Unavailable
from server.openai.failures import error_response
from server.openai.gate import Gate, Observer
from server.openai.peer_certificate import CertificateProtocol
from server.openai.tls import HttpTls
from server.serving.service import Service

PATHS = frozenset(
    {
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
    }
)
_HEALTH = "/health"
_BACKLOG = 2048
# Time for the last bytes of answers to reach the clients.
_LAST_BYTES_SECONDS = 2
_KEEP_ALIVE_SECONDS = 65


class HttpServer:
    """Serves OpenAI's API by a :class:`Service` in any state.

    Until :meth:`open` has been called, requests are told that the server is starting. ``/health``
    is open to anybody, because probes have no token.
    """

    def __init__(
        self,
        service: Service,
        host: str,
        port: int,
        *,
        authenticator: Authenticator,
        observers: Sequence[Observer] = (),
        not_ready: Callable[[], str] = lambda: "",
        max_body_bytes: int = 16 * 2**20,
        only_loopback: bool = False,
        allow_origins: Sequence[str] = (),
        tls: HttpTls | None = None,
        tool_parser: str | None = None,
    ) -> None:
        """Prepare to listen on ``port``, 0 for any free one.

        ``not_ready`` returns why the server is not to get requests, empty if it is.
        ``only_loopback``: a request's Host must be a name of this machine. Pages of
        ``allow_origins`` may call from a browser. ``tool_parser`` is vLLM's name of what reads
        calls of tools; None: there are none.
        """
        self._service = service
        self._host = host
        self._wanted_port = port
        self._not_ready = not_ready
        self._tls = tls
        self._tool_parser = tool_parser
        self._app: ASGIApp | None = None
        app: ASGIApp = Gate(
            self._route,
            authenticator,
            observers,
            paths=PATHS,
            max_body_bytes=max_body_bytes,
            only_loopback=only_loopback,
        )
        if allow_origins:
            app = CORSMiddleware(
                app, allow_origins=list(allow_origins), allow_methods=["*"], allow_headers=["*"]
            )
        self._outer = app
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port that the server listens on, 0 before :meth:`start`."""
        return self._port

    @property
    def url(self) -> str:
        """The base of the API's addresses."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}/v1"

    async def start(self) -> None:
        """Listen.

        Raises :class:`server.errors.InvalidArgument`, naming ``http_port`` or ``host``, if that
        is impossible.
        """
        listener = self._listen()
        self._port = listener.getsockname()[1]
        tls = self._tls
        self._server = _Uvicorn(
            uvicorn.Config(
                self._with_health,
                http=CertificateProtocol,
                interface="asgi3",
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
                ssl_context_factory=None if tls is None else lambda *_: tls.context,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def open(self, engine: RunsVllm, name: str) -> None:
        """Answer requests from now on, by vLLM's classes for the model of ``engine``."""
        self._app = await asyncio.to_thread(self._make_app, engine, name)

    async def stop(self) -> None:
        """End: answers that are complete still reach their clients.

        Call :meth:`Service.drain` before, to let requests finish.
        """
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _make_app(self, engine: RunsVllm, name: str) -> ASGIApp:
        # Imported late: it imports vLLM.
        from starlette.routing import Router

        from server.openai.engine_client import InferenceClient
        from server.openai.routes import Routes
        from server.openai.serving import serving_classes

        client = InferenceClient(self._service.inference, engine.vllm_config)
        serving = serving_classes(client, name, tool_parser=self._tool_parser)
        return Router(Routes(self._service, *serving).routes(), redirect_slashes=False)

    async def _with_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == _HEALTH and scope["method"] == "GET":
            problem = self._not_ready()
            response = JSONResponse({"status": "ok"})
            if problem:
                response = error_response(Unavailable(problem))
            await response(scope, receive, send)
        else:
            await self._outer(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            phase = self._service.status().startup_phase or "opening its HTTP port"
            raise Unavailable(f"the server is starting: {phase}")
        # Starlette then raises for an unknown path.
        await self._app({**scope, "app": self}, receive, send)

    def _listen(self) -> socket.socket:
        listener = None
        try:
            (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
                self._host, self._wanted_port, type=socket.SOCK_STREAM
            )
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise cannot_listen(error, self._host, self._wanted_port, "http_") from None
        return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: when the server ends is the application's decision."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
