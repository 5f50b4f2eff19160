"""What has been measured of depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from pruning.probes import Probes
from pruning.quality import Quality
from server.depth.levels import DepthPair

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Speed:
    """Decode throughput of ``num_streams`` concurrent requests.

    ``speedup`` is relative to dense, None if dense could not be run.
    """

    tokens_per_second: float
    speedup: float | None
    num_streams: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements by depth, all under one plan and with the same maps for skipped layers."""

    qualities: Mapping[DepthPair, Quality] = field(default_factory=dict)
    speeds: Mapping[DepthPair, Speed] = field(default_factory=dict)
    probes: Mapping[DepthPair, Probes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("qualities", "speeds", "probes"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __or__(self, other: Measured) -> Measured:
        """Return both; ``other`` counts where both have one."""
        return Measured(
            {**self.qualities, **other.qualities},
            {**self.speeds, **other.speeds},
            {**self.probes, **other.probes},
        )

    def where(self, applies: Callable[[DepthPair], bool]) -> Measured:
        """Return the measurements of those depths alone."""

        def kept(measurements: Mapping[DepthPair, M]) -> dict[DepthPair, M]:
            return {pair: value for pair, value in measurements.items() if applies(pair)}

        return Measured(kept(self.qualities), kept(self.speeds), kept(self.probes))
