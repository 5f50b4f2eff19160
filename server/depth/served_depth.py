"""The depth that a request is served at."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from server.depth.repair import StandIn


class Reason(enum.Enum):
    """Why a request is served at its depth."""

    REQUESTED = "requested"
    DEFAULT = "default"
    AUTO = "auto"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class ServedDepth:
    """The depth that a request is served at, in layers, why, and what stands in for the others."""

    prefill_layers: int
    decode_layers: int
    reason: Reason
    stand_in: StandIn = StandIn.NONE

    @property
    def stand_in_name(self) -> str | None:
        """What stands in, as the settings write it; None where nothing does."""
        return None if self.stand_in is StandIn.NONE else self.stand_in.value
