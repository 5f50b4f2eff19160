"""The metrics, as a scrape over HTTP sees them."""

from __future__ import annotations

import dataclasses
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from pruning.probes import Choosing, Probes, Writing
from pruning.quality import Quality
from server.depth.levels import DepthPair
from server.depth.measured import Measured
from server.depth.repair import Repair, RepairStatus, StandIn
from server.engine.base import LoadInfo
from server.errors import InvalidArgument
from server.telemetry.metrics import WINDOW_SECONDS, Metrics
from server.telemetry.metrics_server import MetricsServer
from tests.server.depth.test_policy import POLICY

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

QUALITY = Quality(12.5, 0.25, 0.75, 0.125, 1000)


def sample(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock)


@pytest.fixture
def server(metrics: Metrics) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    yield server
    server.close()


def scrape(server: MetricsServer, query: str = "") -> Samples:
    url = f"http://127.0.0.1:{server.port}/metrics{query}"
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_counters_and_histograms_by_depth(metrics: Metrics, server: MetricsServer) -> None:
    metrics.count_request("fathom.v1.Inference/Generate", "4", "OK")
    metrics.begin(4, 10, queue=0.02, first_token=0.2)
    metrics.add_tokens(4, 1)
    metrics.observe_inter_token_latency(4, 0.06, 3)
    metrics.add_tokens(4, 3)
    metrics.end(4, 0.26)
    samples = scrape(server)
    method = {"method": "fathom.v1.Inference/Generate"}
    assert sample(samples, "fathom_requests_total", **method, depth="4", code="OK") == 1
    assert sample(samples, "fathom_prompt_tokens_total", depth="4") == 10
    assert sample(samples, "fathom_generation_tokens_total", depth="4") == 4
    for family, count, total in (
        ("fathom_time_to_first_token_seconds", 1, 0.2),
        ("fathom_inter_token_latency_seconds", 3, 0.06),
        ("fathom_request_duration_seconds", 1, 0.26),
        ("fathom_request_queue_seconds", 1, 0.02),
    ):
        assert sample(samples, f"{family}_count", depth="4") == count
        assert sample(samples, f"{family}_sum", depth="4") == pytest.approx(total)
    assert sample(samples, "fathom_inter_token_latency_seconds_bucket", depth="4", le="0.01") == 0
    assert sample(samples, "fathom_inter_token_latency_seconds_bucket", depth="4", le="0.025") == 3


def test_tokens_per_second_falls_to_zero_when_idle(
    metrics: Metrics, server: MetricsServer, clock: Clock
) -> None:
    assert WINDOW_SECONDS == 10
    assert sample(scrape(server), "fathom_tokens_per_second", depth="8") is None
    for _ in range(20):
        metrics.add_tokens(8, 6)
        metrics.add_tokens(4, 3)
        clock.now += 0.5
    assert clock.now == 1010.25
    # The window is the ten seconds 1001 to 1010, the last of which has just begun.
    assert sample(scrape(server), "fathom_tokens_per_second", depth="8") == 6 * 18 / 10
    assert sample(scrape(server), "fathom_tokens_per_second", depth="4") == 3 * 18 / 10
    clock.now += 5
    assert sample(scrape(server), "fathom_tokens_per_second", depth="8") == 6 * 8 / 10
    clock.now += 5
    assert sample(scrape(server), "fathom_tokens_per_second", depth="8") == 0
    assert sample(scrape(server), "fathom_generation_tokens_total", depth="8") == 120


def test_the_engine_is_asked_at_each_scrape(metrics: Metrics, server: MetricsServer) -> None:
    is_up, load = False, LoadInfo(0, 0)
    metrics.watch_engine(lambda: is_up, lambda: load, lambda layers: is_up)
    samples = scrape(server)
    assert sample(samples, "fathom_engine_up") == 0
    is_up, load = True, LoadInfo(3, 5)
    metrics.count_engine_restart()
    samples = scrape(server)
    assert sample(samples, "fathom_engine_up") == 1
    assert sample(samples, "fathom_requests_running") == 3
    assert sample(samples, "fathom_requests_waiting") == 5
    assert sample(samples, "fathom_engine_restarts_total") == 1


def test_the_policy_in_force_is_shown_and_no_other(metrics: Metrics, server: MetricsServer) -> None:
    measured = {DepthPair(4, 4): QUALITY, DepthPair(3, 3): QUALITY, DepthPair(2, 8): QUALITY}
    metrics.set_policy(POLICY.with_measured(Measured(measured)).with_auto_level("fast"))
    samples = scrape(server)
    assert sample(samples, "fathom_depth_perplexity", depth="4") == 12.5
    assert sample(samples, "fathom_depth_perplexity_stderr", depth="4") == 0.25
    assert sample(samples, "fathom_depth_agreement_ratio", depth="4") == 0.75
    assert sample(samples, "fathom_depth_kl_nats", depth="3") == 0.125
    # Prompt tokens at depth 2 make it no quality of depth 8.
    assert sample(samples, "fathom_depth_perplexity", depth="8") is None
    assert sample(samples, "fathom_policy_level", level="fast") == 1
    assert sample(samples, "fathom_policy_level", level="dense") == 0
    assert sample(samples, "fathom_layer_block_influence", layer="7") == 0.5
    plan = dataclasses.replace(POLICY.plan, scores=(0.25,) * 8)
    metrics.set_policy(POLICY.with_plan(plan))
    samples = scrape(server)
    assert sample(samples, "fathom_layer_block_influence", layer="7") == 0.25
    assert not [name for name, _ in samples if name.startswith("fathom_depth_")]


def test_repair_is_shown_where_it_is_wanted(metrics: Metrics, server: MetricsServer) -> None:
    assert not [name for name, _ in scrape(server) if name.startswith("fathom_repair_")]
    repair = Repair("sha256:aa", 2048, 7680, {0: 0.25, 7: 0.5})
    metrics.set_repair(RepairStatus(StandIn.CLOSED_FORM, repair, kl_nats=0.5, kl_nats_without=2.0))
    samples = scrape(server)
    assert sample(samples, "fathom_repair_up") == 1
    labels = {"fingerprint": "sha256:aa", "kind": "closed-form"}
    assert sample(samples, "fathom_repair_info", **labels) == 1
    assert sample(samples, "fathom_repair_bytes") == 2048
    assert sample(samples, "fathom_repair_unexplained_share", layer="7") == 0.5
    assert sample(samples, "fathom_repair_kl_nats", repair="with") == 0.5
    assert sample(samples, "fathom_repair_kl_nats", repair="without") == 2.0
    metrics.set_repair(RepairStatus(StandIn.CLOSED_FORM, problem="the maps are damaged"))
    samples = scrape(server)
    assert sample(samples, "fathom_repair_up") == 0
    assert {name for name, _ in samples if name.startswith("fathom_repair_")} == {
        "fathom_repair_up"
    }


def test_probes_by_level(metrics: Metrics, server: MetricsServer) -> None:
    writing = Writing(3.0, 2.0, 1.5, 0.125, 0.25, 0.1, 0.375, 16, 768)
    alone = Writing(None, None, None, None, 0.75, None, None, 16, 768)
    choosing = Choosing(0.875, 0.0625, 0.5, 0.03125, 64, 0.25)
    dense, fast = DepthPair(8, 8), DepthPair(4, 4)
    probes = {fast: Probes(writing, choosing), dense: Probes(alone, None)}
    metrics.set_policy(
        POLICY.with_measured(
            Measured(probes={**probes, DepthPair(3, 3): probes[fast]})
        ).with_present_level("dense", "fast")
    )
    samples = scrape(server)
    expected = {
        "writing_perplexity_ratio": {"fast": 1.5},
        "writing_perplexity_ratio_stderr": {"fast": 0.125},
        "writing_repeated_ratio": {"fast": 0.25, "dense": 0.75},
        "writing_first_token_changed_ratio": {"fast": 0.375},
        "choosing_accuracy_ratio": {"fast": 0.875},
        "choosing_accuracy_stderr": {"fast": 0.0625},
        "choosing_agreement_ratio": {"fast": 0.5},
        "choosing_agreement_stderr": {"fast": 0.03125},
    }
    shown = {
        name: {
            dict(labels)["level"]: value
            for (family, labels), value in samples.items()
            if family == f"fathom_level_{name}"
        }
        for name in expected
    }
    assert shown == expected
    assert sample(samples, "fathom_policy_level", level="dense") == 1
    assert sample(samples, "fathom_policy_score_level", level="fast") == 1
    assert sample(samples, "fathom_policy_score_level", level="dense") == 0
    assert sample(samples, "fathom_policy_degraded") == 1, "for Score"


def test_startup_by_phase(metrics: Metrics, server: MetricsServer) -> None:
    metrics.set_startup("engine", 4.5)
    assert sample(scrape(server), "fathom_startup_seconds", phase="engine") == 4.5


def test_what_others_register_is_on_the_same_endpoint(server: MetricsServer) -> None:
    gauge = Gauge("vllm:registered_elsewhere", "As vLLM registers its own.", registry=REGISTRY)
    try:
        gauge.set(7)
        samples = scrape(server)
        assert sample(samples, "vllm:registered_elsewhere") == 7
        assert sample(samples, "process_start_time_seconds") is not None
        assert sample(samples, "fathom_engine_up") == 0
    finally:
        REGISTRY.unregister(gauge)


def test_a_scrape_can_ask_for_some_families(metrics: Metrics, server: MetricsServer) -> None:
    metrics.set_policy(POLICY)
    samples = scrape(server, "?name[]=fathom_policy_level&name[]=fathom_engine_up")
    assert {name for name, _ in samples} == {"fathom_policy_level", "fathom_engine_up"}


def test_two_servers_of_one_process_keep_apart() -> None:
    first, second = Metrics(), Metrics()
    first.count_engine_restart()
    assert isinstance(first.registry, CollectorRegistry)
    assert first.registry.get_sample_value("fathom_engine_restarts_total") == 1
    assert second.registry.get_sample_value("fathom_engine_restarts_total") == 0


def test_a_port_in_use_is_named(metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument) as caught:
            MetricsServer(metrics, "127.0.0.1", port)
    assert caught.value.field == "metrics_port"
    assert str(caught.value) == (
        f"metrics_port: got {port}, allowed: a port that is free on 127.0.0.1 "
        "(Address already in use)"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_named(metrics: Metrics, host: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        MetricsServer(metrics, host, 0)
    assert caught.value.field == "metrics_host"
    assert host in str(caught.value)
