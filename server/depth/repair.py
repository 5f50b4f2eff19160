"""Repair: what stands in for skipped layers, and what has become of what the settings ask for."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class StandIn(enum.Enum):
    """What stands in for the layers that tokens skip."""

    NONE = "none"
    CLOSED_FORM = "closed-form"
    HEALED = "healed"


@dataclass(frozen=True, slots=True)
class Repair:
    """Maps that stand in for skipped layers at every depth.

    ``num_bytes`` is the memory that they take, ``num_tokens`` how many tokens they were fitted on.
    ``unexplained`` has, by layer, the share of what the layer adds that its map does not: 0 where
    it does all of it, 1 where it is no better than skipping.
    """

    fingerprint: str
    num_bytes: int
    num_tokens: int
    unexplained: Mapping[int, float]
    kind: StandIn = StandIn.CLOSED_FORM


@dataclass(frozen=True, slots=True)
class RepairStatus:
    """What the settings ask for, what is in force, and why that is not the same.

    ``kl_nats`` is the mean KL divergence of the levels from the dense model, in nats a token, with
    the maps and ``kl_nats_without`` without them, when the two were last compared.
    """

    wanted: StandIn = StandIn.NONE
    in_force: Repair | None = None
    # Why nothing stands in although that is wanted; empty where something does.
    problem: str = ""
    kl_nats: float | None = field(default=None, kw_only=True)
    kl_nats_without: float | None = field(default=None, kw_only=True)
