"""Metrics of several registries in one scrape."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.engine.dedicated.vllm_metrics import MergedMetrics, registry_and_logger


def registry(number: int) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("vllm:tokens", "Tokens.", ["engine"], registry=made).labels("0").inc(number)
    Histogram("vllm:seconds", "Seconds.", buckets=(1, 2), registry=made).observe(number)
    return made


def test_samples_are_labelled_and_families_are_one() -> None:
    registries = {"16": registry(1), "8": registry(2)}
    scraped = CollectorRegistry()
    scraped.register(MergedMetrics(registries.items))
    families = list(text_string_to_metric_families(generate_latest(scraped).decode()))
    assert len([f for f in families if f.name == "vllm:tokens"]) == 1
    samples = {
        (s.name, s.labels["depth"], s.labels.get("le", "")): s.value
        for family in families
        for s in family.samples
        if not s.name.endswith("_created")
    }
    assert samples["vllm:tokens_total", "16", ""] == 1
    assert samples["vllm:tokens_total", "8", ""] == 2
    assert samples["vllm:seconds_bucket", "16", "1.0"] == 1
    assert samples["vllm:seconds_bucket", "8", "1.0"] == 0
    assert samples["vllm:seconds_sum", "8", ""] == 2


def test_a_registry_that_comes_later_is_seen() -> None:
    registries: dict[str, CollectorRegistry] = {}
    scraped = CollectorRegistry()
    scraped.register(MergedMetrics(registries.items))
    assert generate_latest(scraped) == b""
    registries["4"] = registry(3)
    assert b'vllm:tokens_total{depth="4",engine="0"} 3.0' in generate_latest(scraped)


def test_every_engine_has_a_registry_of_its_own() -> None:
    first, first_logger = registry_and_logger()
    second, second_logger = registry_and_logger()
    for made, logger in ((first, first_logger), (second, second_logger)):
        logger._counter_cls(name="vllm:n", documentation="N.", labelnames=["a"]).labels("1").inc()
        assert made.get_sample_value("vllm:n_total", {"a": "1"}) == 1
