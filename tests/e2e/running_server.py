"""A real ``fathom serve`` in a process of its own."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
from prometheus_client.parser import text_string_to_metric_families

from server.rpc.client import CallError, Client
from tests.fathom_command import FATHOM, environment, free_ports
from tests.fathom_command import PATIENCE as PATIENCE

# Little of everything, so that a start is quick and several servers fit beside each other. The
# layers run uncompiled: to compile them takes longer than most of the tests. Levels depend on no
# measurement, no maps come in while a test runs, and a busy machine decides neither what is
# measured at the start nor about automatic depth.
SMALL: Mapping[str, object] = {
    "dtype": "float32",
    "kv_cache_gib": 0.25,
    "max_num_seqs": 64,
    "calibration_tokens": 2048,
    "quality_tokens": 1024,
    "compile_layers": False,
    "startup_seconds": "inf",
    "auto_first_token_seconds": 3600.0,
    "auto_inter_token_seconds": 3600.0,
    "repair": "none",
    "levels": "dense=0.0,balanced=0.25,fast=0.5,turbo=0.75",
}

T = TypeVar("T")


class RunningServer:
    """The process, where it listens, and what it has written so far."""

    def __init__(self, directory: Path, **settings: object) -> None:
        """Start; ``directory`` gets the log and, unless it is set, the state directory.

        ``variables`` are those of its environment that differ from this process's. A setting that
        is None has its default.
        """
        variables = settings.pop("variables", {})
        assert isinstance(variables, dict)
        directory.mkdir(parents=True, exist_ok=True)
        free_port, metrics_port = free_ports(2)
        self.port = int(str(settings.pop("port", free_port)))
        self.metrics_port = int(str(settings.pop("metrics_port", metrics_port)))
        http_port = settings.get("http_port")
        self.http_port = None if http_port is None else int(str(http_port))
        self.state_directory = Path(str(settings.pop("state_dir", directory / "state")))
        self._log = directory / "log"
        chosen = {
            **SMALL,
            **settings,
            "port": self.port,
            "metrics_port": self.metrics_port,
            "state_dir": self.state_directory,
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [FATHOM, "serve", *flags(chosen)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(**variables),
                cwd=directory,
            )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.address, timeout=timeout)

    def readiness(self) -> list[str]:
        """Return the lines that a probe of a server that is ready gets."""
        url = f"http://127.0.0.1:{self.metrics_port}/readyz"
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return str(response.read().decode()).splitlines()

    def wait_until_serving(self) -> None:
        """Raise AssertionError, with the log, for a server that ends before it serves."""

        def serves() -> bool:
            assert self.process.poll() is None, f"the server has ended:\n{self.log}"
            try:
                with self.client(timeout=5.0) as client:
                    return client.health() == "SERVING"
            except CallError as error:
                if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    raise
                return False

        until(serves, lambda: f"not serving:\n{self.log}")

    def scrape(self) -> Scrape:
        with urllib.request.urlopen(self.metrics_url, timeout=PATIENCE) as response:
            return Scrape(response.read().decode())

    def children(self) -> list[psutil.Process]:
        """Return the processes that the server has started, and those that these have."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def copy_state(self, directory: Path) -> Path:
        """Copy the state directory, for a server that measures something else."""
        ignored = shutil.ignore_patterns("*.lock", "compiled")
        return Path(shutil.copytree(self.state_directory, directory / "state", ignore=ignored))

    def engine_processes(self) -> list[psutil.Process]:
        """Return the children that run the model, without those that have just ended."""
        engines = []
        for child in self.children():
            with suppress(psutil.NoSuchProcess):
                if "EngineCore" in " ".join(child.cmdline()):
                    engines.append(child)
        return engines

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """Leave no process behind, whatever has happened."""
        if self.process.poll() is not None:
            return
        children = self.children()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in psutil.wait_procs(children, timeout=5.0)[1]:
            child.kill()


class Scrape:
    """The samples of one reading of the metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        # Also those that have no samples yet.
        self.families = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum over the samples that have these labels; 0.0 where there is none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Return the values of a family by one of its labels."""
        return {
            sample.labels[label]: sample.value for sample in self._samples if sample.name == name
        }

    def value(self, name: str) -> float:
        """Return the value of the only sample of that name."""
        (value,) = (sample.value for sample in self._samples if sample.name == name)
        return value


@contextmanager
def running_server(directory: Path, **settings: object) -> Iterator[RunningServer]:
    """Yield a server that serves, and stop it."""
    server = RunningServer(directory, **settings)
    try:
        server.wait_until_serving()
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.log
    finally:
        server.close()


def flags(settings: Mapping[str, object]) -> list[str]:
    return [
        argument
        for name, value in settings.items()
        if value is not None
        for argument in (f"--{name.replace('_', '-')}", str(value))
    ]


def until(found: Callable[[], T | None], problem: Callable[[], str]) -> T:
    """Return the first result that is true, asked for again and again."""
    give_up = time.monotonic() + PATIENCE
    while True:
        result = found()
        if result:
            return result
        assert time.monotonic() < give_up, problem()
        time.sleep(0.05)


def measurements_in(log: str) -> list[str]:
    """Return the measurements of the start, in order."""
    return re.findall(r"(Ranking the layers|Measuring \w+): 100 %", log)
