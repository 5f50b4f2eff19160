"""A ``fathom serve`` process with the demo model, at its levels."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.subjects.base import free_port
from bench.subjects.fathom_server import is_serving
from bench.subjects.server_process import ServerProcess


@dataclass(frozen=True, slots=True)
class DemoServer:
    """A running server: its ports and its process."""

    address: str
    metrics_url: str
    process: ServerProcess


@asynccontextmanager
async def demo_server(**settings: object) -> AsyncIterator[DemoServer]:
    """Yield a server that is ready; raise :class:`ServerFailed` if it does not get ready."""
    port, metrics_port = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fathom-") as directory:
        chosen = {"port": port, "metrics_port": metrics_port, "state_dir": directory}
        # What a start leaves would be measured in the gaps of the load that is timed.
        chosen |= {"startup_seconds": "inf"} | settings
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
        command = [Path(sys.executable).parent / "fathom", "serve", *flags]
        process = ServerProcess(command, Path(directory) / "log")

        try:
            await process.wait_until(lambda: is_serving(address))
            yield DemoServer(address, f"http://127.0.0.1:{metrics_port}/metrics", process)
        finally:
            process.close()
