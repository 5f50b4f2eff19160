"""What the port of the metrics answers besides the metrics: probes, and a page for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from importlib.resources import files
from typing import TYPE_CHECKING

from server.telemetry.prompt_box import PromptBox

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

# The longest that a server's event loop may take to answer; a probe waits no longer than that.
_LOOP_SECONDS = 4.0
# Nothing comes from elsewhere, and nothing that a model or client is called can be code.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Probes:
    """Whether the server is alive and ready, asked from the threads of HTTP.

    They ask the event loop, as calls over gRPC do: a server whose loop hangs is not alive.
    """

    def __init__(self) -> None:
        """Must be called in the event loop of the server."""
        self.loop = asyncio.get_running_loop()
        # Returns why the server takes no calls, or an empty text if it does.
        self.not_ready: Callable[[], str] = lambda: "the server is starting"
        # Returns what does not keep the server from serving, but is wrong, one line each.
        self.warnings: Callable[[], list[str]] = list
        # Set once the service that runs prompts exists.
        self.prompt_box: PromptBox | None = None

    def not_alive_problem(self) -> str:
        """Return why the server is not alive; empty if it is."""
        return self._asked(lambda: "")

    def readiness(self) -> str:
        """Return why the server is not ready, or "ok", and what else is wrong, each on a line."""

        def told() -> str:
            warnings = [f"warning: {' '.join(each.split())}" for each in self.warnings()]
            return "\n".join([self.not_ready() or "ok", *warnings])

        return self._asked(told)

    def _asked(self, question: Callable[[], str]) -> str:
        answer: Future[str] = Future()

        def put() -> None:
            answer.set_result(question())

        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed
            return "the server has ended"
        try:
            return answer.result(_LOOP_SECONDS)
        except TimeoutError:
            return f"the server has not answered for {_LOOP_SECONDS:g} s"


def with_pages(metrics: WSGIApplication, probes: Probes) -> WSGIApplication:
    """Return an application with /, /prompt, /livez and /readyz beside those of ``metrics``."""
    page = files(__package__).joinpath("page.html").read_bytes()

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/livez":
                problem = probes.not_alive_problem()
                return _probed(problem or "ok", start_response, is_good=not problem)
            case "/readyz":
                told = probes.readiness()
                is_ready = told.partition("\n")[0] == "ok"
                return _probed(told, start_response, is_good=is_ready)
            case "/prompt" if probes.prompt_box is not None:
                return probes.prompt_box(environ, start_response)
            case "/":
                headers = [
                    ("Content-Type", "text/html; charset=utf-8"),
                    ("Content-Security-Policy", _PAGE_POLICY),
                    ("X-Content-Type-Options", "nosniff"),
                    ("Referrer-Policy", "no-referrer"),
                ]
                start_response("200 OK", headers)
                return [page]
            case _:
                return metrics(environ, start_response)

    return answer


def _probed(told: str, start_response: StartResponse, *, is_good: bool) -> Iterable[bytes]:
    status = "200 OK" if is_good else "503 Service Unavailable"
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{told}\n".encode()]
