"""Which depths are checked, and what that says about health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server.engine.base import LayerSelection
from server.errors import NonFiniteResult
from server.serving.result_check import ResultCheck
from server.serving.service_state import ServiceState, State
from server.telemetry.metrics import Metrics
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine

DENSE, HALF, QUARTER = (
    LayerSelection(tuple(range(n)), tuple(range(n)))
    for n in (0, NUM_LAYERS // 2, 3 * NUM_LAYERS // 4)
)


class SometimesDamaged(ToyEngine):
    """Stands for weights that are damaged at some depths."""

    def __init__(self) -> None:
        super().__init__()
        self.damaged: set[LayerSelection] = set()
        self.checked: list[LayerSelection] = []

    async def score(self, request_id: str, token_ids: Any, num_context: int, *rest: Any) -> Any:
        layers = rest[0]
        self.checked.append(layers)
        if layers in self.damaged:
            raise NonFiniteResult(layers.depth_text(NUM_LAYERS))
        return await super().score(request_id, token_ids, num_context, *rest)


class Checked:
    """A check that runs, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.engine = SometimesDamaged()
        self.state = ServiceState(Metrics())
        self.metrics = Metrics()
        self.check = ResultCheck(self.engine, self.state, self.metrics, clock=lambda: self.now)

    async def rest(self, num_checks: int) -> None:
        """Wait until so many checks have been made, and their outcome is known."""
        while len(self.engine.checked) < num_checks or self.check._waiting:
            await asyncio.sleep(0)
        while not self.is_known(self.engine.checked[-1]):
            await asyncio.sleep(0)

    def is_known(self, layers: LayerSelection) -> bool:
        return (layers in self.check._problems) == (layers in self.engine.damaged)

    def fail(self, layers: LayerSelection) -> None:
        with pytest.raises(NonFiniteResult), self.check.watching(layers, 1, "request a"):
            raise NonFiniteResult(layers.depth_text(NUM_LAYERS))


@pytest.fixture
async def checked() -> AsyncIterator[Checked]:
    checked = Checked()
    await checked.engine.start()
    checked.state.turn_to(State.SERVING)
    task = checked.check.task()
    task.start()
    yield checked
    await task.stop()
    await checked.engine.shutdown()


async def test_levels_are_checked_once(checked: Checked) -> None:
    checked.engine.damaged = {HALF}
    checked.check.follow([DENSE, HALF], DENSE)
    await checked.rest(2)
    checked.check.follow([DENSE, HALF, QUARTER], DENSE)
    await checked.rest(3)
    assert checked.engine.checked == [DENSE, HALF, QUARTER]
    assert len(checked.state.problems) == 1
    assert "at depth 4 " in checked.state.problems[0]
    assert checked.state.is_healthy
    checked.check.follow([DENSE, HALF], HALF)
    assert not checked.state.is_healthy


async def test_an_engine_that_was_restarted_is_checked_anew(checked: Checked) -> None:
    checked.engine.damaged = {DENSE}
    checked.check.follow([DENSE, HALF], DENSE)
    await checked.rest(2)
    assert not checked.state.is_healthy
    checked.engine.damaged = set()
    checked.check.engine_restarted()
    await checked.rest(4)
    assert checked.state.is_healthy
    assert checked.state.problems == ()


async def test_a_request_does_not_decide_about_health(checked: Checked) -> None:
    checked.check.follow([DENSE], DENSE)
    await checked.rest(1)
    for _ in range(3):
        checked.fail(DENSE)
    assert checked.engine.checked == [DENSE], "it was found sound a moment ago"
    assert checked.state.is_healthy
    checked.now = 61.0
    checked.fail(DENSE)
    await checked.rest(2)
    assert checked.state.is_healthy
    name = "fathom_non_finite_results_total"
    assert checked.metrics.registry.get_sample_value(name, {"depth": "1"}) == 4


async def test_weights_that_are_damaged_later_are_found(checked: Checked) -> None:
    checked.check.follow([DENSE], DENSE)
    await checked.rest(1)
    checked.engine.damaged = {DENSE, QUARTER}
    checked.fail(QUARTER)
    await checked.rest(2)
    assert (len(checked.state.problems), checked.state.is_healthy) == (1, True)
    checked.now = 61.0
    checked.fail(DENSE)
    await checked.rest(3)
    assert (len(checked.state.problems), checked.state.is_healthy) == (2, False)
