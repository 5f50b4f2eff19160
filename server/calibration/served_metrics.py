"""The importance metrics that a server can rank layers by."""

from __future__ import annotations

import typing

from pruning.metrics import METRICS, Metric
from pruning.metrics.base import Need
from server.config.depth import ServedMetric
from server.engine.base import Engine
from server.errors import FailedPrecondition, InvalidArgument

SERVED_METRICS: tuple[str, ...] = typing.get_args(ServedMetric)
# Takes the better order of Block Influence's and of greedy removal's.
AUTO = "auto"


def searches(name: str) -> bool:
    """Return whether the metric of that name compares the model without some of its layers."""
    return name == AUTO or METRICS[name].need is Need.LOSSES


def find_metric(name: str, engine: Engine) -> Metric:
    """Return the metric of that name, other than ``AUTO``, one that ``engine`` can measure.

    Raises :class:`InvalidArgument` for a name that no server takes, and
    :class:`FailedPrecondition` for a search where the engine runs the depths of levels alone.
    """
    if name not in SERVED_METRICS:
        raise InvalidArgument("metric", name, ", ".join(SERVED_METRICS))
    if searches(name) and not engine.serves_any_depth:
        others = ", ".join(other for other in SERVED_METRICS if not searches(other))
        raise FailedPrecondition(
            f"metric: got {name!r}, allowed: {others}; {name} compares the model without some of "
            f"its layers with the dense model, but {engine.name} engines run the depths of levels "
            "alone and measure no divergence. A plan that an elastic engine has made can be used"
        )
    return METRICS[name]
