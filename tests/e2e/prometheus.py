"""A real Prometheus server."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running_server import until
from tests.fathom_command import free_ports


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query; none while it is not up."""
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self._url}?{query}", timeout=30) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it is loading what it has kept
                return []
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        except urllib.error.URLError:
            return []
        assert answer["status"] == "success", answer
        samples: list[dict[str, Any]] = answer["data"]["result"]
        return samples

    def by_depth(self, expression: str) -> dict[str, float]:
        return {
            sample["metric"]["depth"]: float(sample["value"][1])
            for sample in self.query(expression)
        }


@contextmanager
def running_prometheus(
    directory: Path,
    metrics_port: int,
    *,
    job: str = "fathom",
    labels: Mapping[str, str] | None = None,
    rules: Mapping[str, Any] | None = None,
) -> Iterator[Prometheus]:
    """Yield a server that has scraped the metrics, or skip the test where there is none.

    ``rules`` are groups of rules that it evaluates, ``labels`` those of all samples.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is absent; .ci/install installs it where it can")
    target = {"targets": [f"127.0.0.1:{metrics_port}"], "labels": dict(labels or {})}
    # All of it is JSON, which is YAML, too.
    configuration: dict[str, Any] = {
        "global": {
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "evaluation_interval": "1s",
        },
        "scrape_configs": [{"job_name": job, "static_configs": [target]}],
    }
    if rules is not None:
        (directory / "rules.yml").write_text(json.dumps(rules))
        configuration["rule_files"] = [str(directory / "rules.yml")]
    (directory / "prometheus.yml").write_text(json.dumps(configuration))
    (port,) = free_ports(1)
    log = directory / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=file,
            stderr=file,
            cwd=directory,
        )
    try:
        running = Prometheus(port)

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return any(float(sample["value"][1]) for sample in running.query("up"))

        until(is_up, lambda: f"no scrape has succeeded:\n{log.read_text()}")
        yield running
    finally:
        process.terminate()
        process.wait()
