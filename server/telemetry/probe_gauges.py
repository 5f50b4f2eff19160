"""Gauges of how the levels write and choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from pruning.probes import Choosing, Writing
from server.depth.policy import DepthPolicy

_WRITING: dict[str, tuple[str, Callable[[Writing], float | None]]] = {
    "perplexity_ratio": (
        "Perplexity under the dense model of what the level writes, divided by that of what the "
        "dense model writes.",
        lambda writing: writing.ratio,
    ),
    "perplexity_ratio_stderr": (
        "Standard error of that ratio.",
        lambda writing: writing.ratio_stderr,
    ),
    "repeated_ratio": (
        "Share of 4-grams that have occurred before in the same continuation.",
        lambda writing: writing.repeated_share,
    ),
    "first_token_changed_ratio": (
        "Share of prompts that the dense model continues with another token.",
        lambda writing: writing.first_token_changed,
    ),
}

_CHOOSING: dict[str, tuple[str, Callable[[Choosing], float | None]]] = {
    "accuracy_ratio": (
        "Share of passages whose true continuation the level finds most likely.",
        lambda choosing: choosing.accuracy,
    ),
    "accuracy_stderr": (
        "Standard error of that accuracy.",
        lambda choosing: choosing.accuracy_stderr,
    ),
    "agreement_ratio": (
        "Share of passages for which the level chooses what the dense model does.",
        lambda choosing: choosing.agreement,
    ),
    "agreement_stderr": (
        "Standard error of that agreement.",
        lambda choosing: choosing.agreement_stderr,
    ),
}


def probe_gauges(policy: DepthPolicy) -> Iterator[Metric]:
    """Yield a family for each gauge; a level that was not measured has no sample."""
    measured = {
        level.name: policy.probes[level.depths]
        for level in policy.levels
        if level.depths in policy.probes
    }
    writings = {name: probes.writing for name, probes in measured.items()}
    choosings = {name: probes.choosing for name, probes in measured.items()}
    for name, (documentation, value) in _WRITING.items():
        yield _family(
            f"fathom_level_writing_{name}",
            documentation,
            {level: value(writing) for level, writing in writings.items() if writing is not None},
        )
    for name, (documentation, value_of) in _CHOOSING.items():
        yield _family(
            f"fathom_level_choosing_{name}",
            documentation,
            {
                level: value_of(choosing)
                for level, choosing in choosings.items()
                if choosing is not None
            },
        )


def _family(name: str, documentation: str, values: dict[str, float | None]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=["level"])
    for level, value in values.items():
        if value is not None:
            family.add_metric([level], value)
    return family
