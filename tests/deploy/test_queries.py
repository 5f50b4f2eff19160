"""Every expression of dashboard, rules and autoscalers finds data.

A real Prometheus scrapes a real server that serves three depths, with labels as the PodMonitor
gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.dashboard import queries
from server.rpc.client import Client
from server.rpc.client_tls import ClientTls
from tests.deploy.rendering import DEPLOY, base_with
from tests.deploy.rules import rule_groups, rules
from tests.e2e.calls import at_once, greedy_request
from tests.e2e.prometheus import Prometheus, running_prometheus
from tests.e2e.running_server import PATIENCE, RunningServer, until
from tests.e2e.test_page import dom
from tests.server.access.authority import Authority

DEPTHS = (16, 12, 8)
LABELS = {"namespace": "fathom", "pod": "fathom-0"}
# Alerts compare a value with a number; what they compare must be there.
COMPARISON = re.compile(r"\s(==|<|>)\s[\d.]+\s*$")
ABSENT = re.compile(r"absent\((.+)\)")


class TlsServer(RunningServer):
    """Has a certificate, whose expiry is a metric, and repair."""

    tls: ClientTls

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.address, timeout=timeout, tls=self.tls)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    directory = tmp_path_factory.mktemp("server")
    authority = Authority()
    certificate, key = authority.issue("server").write(directory, "server")
    TlsServer.tls = ClientTls(ca=authority.pem)
    server = TlsServer(directory, tls_certificate=certificate, tls_key=key, repair="closed-form")
    try:
        server.wait_until_serving()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def prometheus(server: TlsServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    groups = rule_groups()
    for group in groups["groups"]:
        group["interval"] = "1s"
    with running_prometheus(
        tmp_path_factory.mktemp("prometheus"),
        server.metrics_port,
        job="fathom/fathom",
        labels=LABELS,
        rules=groups,
    ) as prometheus:
        yield prometheus


def panel_queries() -> list[str]:
    """Return the dashboard's queries, as Grafana asks them with everything chosen."""
    variables = {"$job": ".*", "$instance": ".*", "$__rate_interval": "15s"}
    found = []
    for _, expression in queries():
        for name, value in variables.items():
            expression = expression.replace(name, value)
        assert "$" not in expression, expression
        found.append(expression)
    return found


def rule_expressions() -> list[str]:
    """Return what rules record, by its name and as it is computed, and what alerts compare."""
    found = []
    for rule in rules():
        if "record" in rule:
            found += [rule["record"], rule["expr"]]
        elif match := ABSENT.fullmatch(rule["expr"]):
            found.append(match[1])
        else:
            compared = COMPARISON.sub("", rule["expr"])
            assert compared != rule["expr"], f"{rule['alert']} compares nothing"
            found.append(compared)
    return found


def scaler_queries(directory: Path) -> list[str]:
    """Return what KEDA asks, and what prometheus-adapter does for the metrics of the HPA."""
    manifests = base_with(directory, "monitoring", "autoscaling-keda")
    (scaled,) = (each for each in manifests if each["kind"] == "ScaledObject")
    found = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    (scaler,) = yaml.safe_load_all(
        (DEPLOY / "components" / "autoscaling-hpa" / "horizontalpodautoscaler.yaml").read_text()
    )
    adapter: list[Any] = yaml.safe_load(
        (DEPLOY / "components" / "autoscaling-hpa" / "adapter-rules.yaml").read_text()
    )
    wanted = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert wanted == {rule["name"]["as"] for rule in adapter}
    for rule in adapter:
        series = rule["seriesQuery"]
        found += [
            series,
            rule["metricsQuery"]
            .replace("<<.GroupBy>>", "pod")
            .replace("<<.Series>>", series.partition("{")[0])
            .replace("<<.LabelMatchers>>", 'namespace="fathom",pod=~"fathom-0|fathom-1"'),
        ]
    return found


@pytest.mark.timeout(900)
def test_every_expression_finds_data(
    server: TlsServer, prometheus: Prometheus, tmp_path: Path
) -> None:
    missing = {*panel_queries(), *rule_expressions(), *scaler_queries(tmp_path)}
    requests = [greedy_request("The list", 32, depth=depth) for depth in DEPTHS]

    def all_found() -> bool:
        """Keep the server busy until each expression has had data."""
        with server.client() as client:
            at_once(client.generate, requests)
        missing.difference_update(
            [expression for expression in missing if prometheus.query(expression)]
        )
        return not missing

    until(all_found, lambda: "no data:\n" + "\n".join(missing))


def test_each_level_has_a_point_of_quality_against_throughput(
    server: TlsServer, prometheus: Prometheus
) -> None:
    quality, throughput = (
        prometheus.by_depth(expression.replace("$job", ".*").replace("$instance", ".*"))
        for title, expression in queries()
        if title == "Quality against throughput"
    )
    with server.client() as client:
        levels = {str(level.decode_layers) for level in client.get_model().levels}
    assert levels <= quality.keys() & throughput.keys()


def test_the_page_for_operators_shows_repair(server: TlsServer, tmp_path: Path) -> None:
    """Here because this server has repair."""
    with server.client() as client:
        repair = client.get_model().repair
    page = dom(server.metrics_url.replace("/metrics", "/"), tmp_path)
    assert "Linear maps stand in for skipped layers." in page
    (kind,) = re.findall(r"<dt>Kind</dt><dd[^>]*>([^<]+)</dd>", page)
    assert kind == "closed-form"
    (divergence,) = re.findall(r"<dt>KL divergence, with maps</dt><dd[^>]*>([\d.]+) nats", page)
    assert float(divergence) == pytest.approx(repair.kl_nats, abs=0.0006)
