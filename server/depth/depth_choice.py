"""The ways in which a request names its depth."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layers:
    """A depth as a number of layers."""

    num_layers: int


@dataclass(frozen=True, slots=True)
class PruneRatio:
    """A depth as the share of layers to skip."""

    ratio: float


@dataclass(frozen=True, slots=True)
class NamedLevel:
    """The depths of the level of that name."""

    name: str


@dataclass(frozen=True, slots=True)
class Auto:
    """The server chooses.

    It loses at most ``max_quality_loss``: perplexity divided by that of the dense model, minus 1.
    """

    max_quality_loss: float | None = None


# None is a request that names no depth.
DepthChoice = Layers | PruneRatio | NamedLevel | Auto | None


class RequestKind(enum.Enum):
    """What a request asks the model for: to write, or to say how likely given tokens are."""

    GENERATE = "generate"
    SCORE = "score"
