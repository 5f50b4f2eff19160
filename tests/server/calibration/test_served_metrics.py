"""The metrics that a server takes."""

from __future__ import annotations

import pytest

from pruning.metrics import METRICS
from server.calibration.served_metrics import AUTO, SERVED_METRICS, find_metric
from server.errors import FailedPrecondition, InvalidArgument
from tests.server.rpc.toy_engine import ToyEngine


class FixedDepths(ToyEngine):
    name = "dedicated"
    serves_any_depth = False


@pytest.mark.parametrize("name", [name for name in SERVED_METRICS if name != AUTO])
async def test_metrics_of_a_server_are_those_of_the_library(name: str) -> None:
    assert find_metric(name, ToyEngine()) is METRICS[name]


@pytest.mark.parametrize("name", ["", "greedy", "Block_Influence", "x" * 10_000])
async def test_unknown_metrics(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        find_metric(name, ToyEngine())
    assert caught.value.field == "metric"
    assert caught.value.allowed == ", ".join(SERVED_METRICS)


def test_a_server_takes_every_metric_of_the_library() -> None:
    assert set(SERVED_METRICS) == {*METRICS, AUTO}


async def test_searches_need_an_engine_that_runs_any_layers() -> None:
    engine = FixedDepths()
    for name in ("single_removal_kl", "greedy_kl"):
        with pytest.raises(
            FailedPrecondition,
            match=f"^metric: got '{name}', allowed: block_influence, relative_magnitude, norm, "
            "angular_distance, reverse_order, sequential; "
            ".* dedicated engines run the depths of levels alone",
        ):
            find_metric(name, engine)
    assert find_metric("sequential", engine).name == "sequential"
