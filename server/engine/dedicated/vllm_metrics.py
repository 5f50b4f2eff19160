"""vLLM's Prometheus metrics of several engines in one process.

vLLM puts the metrics of an engine into the process's registry, and removes those of any other
engine from it. So each engine gets a registry of its own, and a scrape gets all of them, merged,
with a label that tells the engines apart. vLLM uses prometheus_client, so this file imports it,
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from vllm.v1.metrics.loggers import PrometheusStatLogger

LABEL = "depth"
Registry = CollectorRegistry

_METRICS = {"_gauge_cls": Gauge, "_counter_cls": Counter, "_histogram_cls": Histogram}
_GROUPS = ("_spec_decoding_cls", "_kv_connector_cls", "_ec_connector_cls", "_perf_metrics_cls")


def registry_and_logger() -> tuple[CollectorRegistry, type[PrometheusStatLogger]]:
    """Return a new registry, and a subclass of vLLM's metrics logger that writes to it."""
    registry = CollectorRegistry()
    metrics = {
        name: staticmethod(partial(metric, registry=registry)) for name, metric in _METRICS.items()
    }

    def own(group: type[Any]) -> type[Any]:
        """Return a subclass of ``group`` that writes its own metrics to the registry, too."""
        made = {name: metric for name, metric in metrics.items() if hasattr(group, name)}
        return type(group.__name__, (group,), made)

    groups = {name: own(getattr(PrometheusStatLogger, name)) for name in _GROUPS}
    return registry, type("LevelEngineStatLogger", (PrometheusStatLogger,), {**metrics, **groups})


class MergedMetrics(Collector):
    """The families of several registries; each sample has the label of its registry."""

    def __init__(self, registries: Callable[[], Iterable[tuple[str, CollectorRegistry]]]) -> None:
        """``registries`` returns labels, all different, and registries; from any thread."""
        self._registries = registries

    def publish(self) -> None:
        """Add the metrics to those that are scraped from this process."""
        REGISTRY.register(self)

    def withdraw(self) -> None:
        """Undo :meth:`publish`."""
        REGISTRY.unregister(self)

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for label, registry in self._registries():
            for family in registry.collect():
                into = merged.get(family.name)
                if into is None:
                    into = Metric(family.name, family.documentation, family.type)
                    merged[family.name] = into
                into.samples += [_labelled(sample, label) for sample in family.samples]
        yield from merged.values()


def _labelled(sample: Sample, label: str) -> Sample:
    return sample._replace(labels={**sample.labels, LABEL: label})
