"""Where the metrics are served, or will be."""

from __future__ import annotations

import asyncio
import logging

from server.access.listening import PortInUse
from server.errors import InvalidArgument
from server.telemetry.metrics import Metrics, MetricsServer

_RETRY_SECONDS = 5.0

logger = logging.getLogger(__name__)


class MetricsPort:
    """Serves the metrics over HTTP; where their port is taken, as soon as it is free.

    Requests can be answered without metrics, so that is an error in the log and no more.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listen, if that is possible.

        Raises :class:`InvalidArgument` for a host or a port that will not do later either.
        """
        self._metrics = metrics
        self._host = host
        self._port = port
        self._server: MetricsServer | None = None
        try:
            self._listen()
        except PortInUse as error:
            logger.error(
                "%s; serving without metrics, and trying again every %g s: free the port, "
                "or start with another metrics_port (0: any free one)",
                error,
                _RETRY_SECONDS,
            )

    @property
    def url(self) -> str | None:
        """Where the metrics are; None while the port is taken."""
        if self._server is None:
            return None
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.port}/metrics"

    async def follow(self, seconds: float = _RETRY_SECONDS) -> None:
        """Try again every so many seconds, until it listens."""
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
        self._server = MetricsServer(self._metrics, self._host, self._port)
