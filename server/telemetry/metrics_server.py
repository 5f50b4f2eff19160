"""The HTTP server of the metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from server.access.listening import cannot_listen
from server.telemetry.http_pages import Probes, with_pages
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class MetricsServer:
    """The HTTP server of the metrics, those of vLLM and of the process included."""

    def __init__(
        self, metrics: Metrics, host: str, port: int, probes: Probes | None = None
    ) -> None:
        """Listen on ``port``, 0 for any free one, in a thread of its own.

        With ``probes``, the page for operators and the probes' answers are there as well.

        Raises :class:`InvalidArgument`, naming ``metrics_port`` or ``metrics_host``, if that is
        impossible.
        """
        both = CollectorRegistry(support_collectors_without_names=True)
        both.register(metrics.registry)
        both.register(REGISTRY)
        self._server: WSGIServer
        try:
            self._server, self._thread = start_http_server(port, host, both)
        except OSError as error:
            raise cannot_listen(error, host, port, "metrics_") from None
        app = self._server.get_app()
        assert app is not None
        app = _as_text(app)
        self._server.set_app(app if probes is None else with_pages(app, probes))

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _as_text(app: WSGIApplication) -> WSGIApplication:
    """Return the application, answering in Prometheus's text format whatever a scrape accepts.

    In OpenMetrics, prometheus_client would change ``vllm:`` in vLLM's names to ``vllm_``.
    """

    def text(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return app({**environ, "HTTP_ACCEPT": "text/plain; version=0.0.4"}, start_response)

    return text
