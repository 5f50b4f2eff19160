"""A real Prometheus server scrapes a real Fathom server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.rpc.client import Client
from tests.e2e.calls import at_once, greedy_request
from tests.e2e.prometheus import Prometheus, running_prometheus
from tests.e2e.running_server import RunningServer, until

DEPTHS = (16, 12, 8, 3)


@pytest.fixture(scope="module")
def prometheus(
    demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    with running_prometheus(directory, demo_server.metrics_port) as prometheus:
        yield prometheus


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
