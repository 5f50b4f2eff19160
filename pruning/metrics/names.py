"""The names of the metrics, as plans and settings have them."""

from __future__ import annotations

BLOCK_INFLUENCE = "block_influence"
RELATIVE_MAGNITUDE = "relative_magnitude"
NORM = "norm"
REVERSE_ORDER = "reverse_order"
SEQUENTIAL = "sequential"
ANGULAR_DISTANCE = "angular_distance"
SINGLE_REMOVAL_KL = "single_removal_kl"
GREEDY_KL = "greedy_kl"

METRIC_NAMES = (
    BLOCK_INFLUENCE,
    RELATIVE_MAGNITUDE,
    NORM,
    REVERSE_ORDER,
    SEQUENTIAL,
    ANGULAR_DISTANCE,
    SINGLE_REMOVAL_KL,
    GREEDY_KL,
)
