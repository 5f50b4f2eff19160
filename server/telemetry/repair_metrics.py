"""Gauges of repair: the maps that stand in for skipped layers, and what they gain."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.depth.repair import RepairStatus, StandIn


class RepairCollector(Collector):
    """Shows one :class:`RepairStatus`; families have no samples where no repair is wanted."""

    def __init__(self) -> None:
        self.status = RepairStatus()

    def collect(self) -> Iterator[Metric]:
        status = self.status
        repair = status.in_force
        is_up = GaugeMetricFamily(
            "fathom_repair_up",
            "Whether maps stand in for skipped layers, as the settings ask for.",
            labels=[],
        )
        if status.wanted is not StandIn.NONE:
            is_up.add_metric([], float(repair is not None))
        divergence = GaugeMetricFamily(
            "fathom_repair_kl_nats",
            "Mean KL divergence of the levels from dense, in nats, with the maps and without.",
            labels=["repair"],
        )
        for label, value in (("with", status.kl_nats), ("without", status.kl_nats_without)):
            if value is not None:
                divergence.add_metric([label], value)
        info = GaugeMetricFamily(
            "fathom_repair_info",
            "1 for the maps that stand in for skipped layers.",
            labels=["fingerprint", "kind"],
        )
        size = GaugeMetricFamily(
            "fathom_repair_bytes", "Memory of the maps that stand in for skipped layers.", labels=[]
        )
        unexplained = GaugeMetricFamily(
            "fathom_repair_unexplained_share",
            "Share of what a layer adds that its map does not; 1 is no better than skipping.",
            labels=["layer"],
        )
        if repair is not None:
            info.add_metric([repair.fingerprint, repair.kind.value], 1.0)
            size.add_metric([], float(repair.num_bytes))
            for layer, share in sorted(repair.unexplained.items()):
                unexplained.add_metric([str(layer)], share)
        yield from (is_up, divergence, info, size, unexplained)
