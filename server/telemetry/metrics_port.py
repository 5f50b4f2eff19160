"""The port of the metrics, which may have to wait until it is free."""

from __future__ import annotations

import asyncio
import logging

from server.access.listening import PortInUse
from server.errors import InvalidArgument
from server.telemetry.http_pages import Probes
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_server import MetricsServer

_RETRY_SECONDS = 5.0

logger = logging.getLogger(__name__)


class MetricsPort:
    """Serves the metrics over HTTP; if their port is taken, as soon as it is free.

    Requests can be answered without metrics, so a taken port is only an error in the log.
    """

    def __init__(
        self, metrics: Metrics, host: str, port: int, probes: Probes | None = None
    ) -> None:
        """Listen, if that is possible.

        Raises :class:`InvalidArgument` for a host or a port that waiting will not make available.
        """
        self._metrics = metrics
        self._host = host
        self._port = port
        self._probes = probes
        self._server: MetricsServer | None = None
        try:
            self._listen()
        except PortInUse as error:
            logger.error(
                "%s; serving without metrics and trying again every %g s: free the port, "
                "or start with another metrics_port (0: any free one)",
                error,
                _RETRY_SECONDS,
            )

    @property
    def url(self) -> str | None:
        """The address of the metrics; None while the port is taken."""
        if self._server is None:
            return None
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.port}/metrics"

    async def follow(self, seconds: float = _RETRY_SECONDS) -> None:
        """Try again every ``seconds``, until the port is free."""
        while self._server is None:
            await asyncio.sleep(seconds)
            try:
                self._listen()
            except InvalidArgument:
                continue
            logger.info("metrics_port is free now; metrics on %s", self.url)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    def _listen(self) -> None:
        self._server = MetricsServer(self._metrics, self._host, self._port, self._probes)
