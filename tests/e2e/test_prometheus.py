"""A real Prometheus server scrapes a real Fathom server."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from server.rpc.client import Client
from tests.e2e.calls import at_once, greedy_request
from tests.e2e.running_server import RunningServer, until
from tests.fathom_command import free_ports

DEPTHS = (16, 12, 8, 3)


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
            raise
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


@pytest.fixture(scope="module")
def prometheus(
    demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is absent")
    directory = tmp_path_factory.mktemp("prometheus")
    (directory / "prometheus.yml").write_text(
        json.dumps(
            {  # which is YAML, too
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
                "scrape_configs": [
                    {
                        "job_name": "fathom",
                        "static_configs": [{"targets": [f"127.0.0.1:{demo_server.metrics_port}"]}],
                    }
                ],
            }
        )
    )
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


def test_tokens_per_second_of_every_depth_in_use(
    prometheus: Prometheus, demo_client: Client
) -> None:
    depths = {str(depth) for depth in DEPTHS}
    requests = [greedy_request("The list", 64, depth=depth) for depth in DEPTHS]
    for expression in (
        "rate(fathom_generation_tokens_total[30s]) > 0",
        "rate(fathom_prompt_tokens_total[30s]) > 0",
        "histogram_quantile(0.9, sum by (depth, le) "
        "(rate(fathom_time_to_first_token_seconds_bucket[30s]))) > 0",
    ):

        def seen(expression: str = expression) -> bool:
            """Keep the server busy until two scrapes have seen each depth at work."""
            at_once(demo_client.generate, requests)
            return depths <= set(prometheus.by_depth(expression))

        until(
            seen, lambda: f"not at all depths: {prometheus.query('fathom_generation_tokens_total')}"
        )


def test_quality_and_speed_beside_each_other(prometheus: Prometheus, demo_client: Client) -> None:
    """What an operator trades, as Prometheus has it and as the server tells its clients."""
    model = demo_client.get_model()
    perplexities = prometheus.by_depth("fathom_depth_perplexity")
    assert perplexities == {
        str(row.decode_layers): pytest.approx(row.quality.perplexity, rel=1e-12)
        for row in model.depths
    }
    influence = prometheus.query("fathom_layer_block_influence")
    assert {sample["metric"]["layer"]: float(sample["value"][1]) for sample in influence} == {
        str(layer.layer): pytest.approx(layer.score, rel=1e-12) for layer in model.plan.layers
    }


def test_metrics_of_vllm_are_there(prometheus: Prometheus) -> None:
    (tokens,) = prometheus.query("vllm:generation_tokens_total")
    assert float(tokens["value"][1]) > 0
    assert tokens["metric"]["model_name"] == "fathom-demo"
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "fathom_engine_up"):
        assert len(prometheus.query(name)) == 1, name
