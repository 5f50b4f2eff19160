"""Admission of requests, and limits on those that wait."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from server.errors import InvalidArgument, Overloaded
from server.serving.admission import Admission, Admitted
from server.serving.fair_queue import FairQueue


async def test_requests_that_wait_are_limited_and_those_that_run_are_not() -> None:
    admission = Admission(FairQueue(), max_waiting=2)
    with ExitStack() as stack:
        first = stack.enter_context(admission.admit("first"))
        stack.enter_context(admission.admit("second"))
        with pytest.raises(Overloaded, match="2 requests wait, as many as max_waiting allows"):
            admission.admit("third").__enter__()
        admission.begin(first)
        admission.begin(first)
        stack.enter_context(admission.admit("third"))
        with pytest.raises(Overloaded):
            admission.admit("fourth").__enter__()
        with pytest.raises(InvalidArgument):
            admission.admit("first").__enter__()
        assert (admission.num_in_flight, admission.num_waiting) == (3, 2)
        idle = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle
    assert (admission.num_in_flight, admission.num_waiting) == (0, 0)


async def test_prompt_tokens_that_wait_are_limited() -> None:
    admission = Admission(FairQueue(), max_waiting=100, max_waiting_tokens=1000)
    with ExitStack() as stack:
        first = stack.enter_context(admission.admit("first"))
        # Where nothing waits, there is room for any prompt that fits the model.
        admission.count_tokens(first, 5000)
        # What cannot fit is refused before anybody has counted its tokens.
        with pytest.raises(Overloaded, match="5000 prompt tokens wait, and max_waiting_tokens all"):
            admission.admit("second").__enter__()
        admission.begin(first)
        second = stack.enter_context(admission.admit("second"))
        admission.count_tokens(second, 600)
        third = stack.enter_context(admission.admit("third"))
        with pytest.raises(Overloaded, match="600 prompt tokens wait"):
            admission.count_tokens(third, 401)
        admission.count_tokens(third, 400)
    with admission.admit("again") as again:
        admission.count_tokens(again, 1000)


class Crowd:
    """Requests of several clients in front of an engine that starts none."""

    def __init__(self, **limits: Any) -> None:
        self.queue = FairQueue(1)
        self.queue.pause()
        self.admission = Admission(self.queue, **limits)
        self.waiting: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, num_tokens: int = 1) -> None:
        """Let a request come whose client is the first letter of its name."""
        self.waiting[name] = task = asyncio.create_task(self._wait(name, num_tokens))
        for _ in range(5):
            await asyncio.sleep(0)
        if task.done():
            task.result()

    async def _wait(self, name: str, num_tokens: int) -> None:
        with self.admission.admit(name, name[0]) as admitted:
            self.admission.count_tokens(admitted, num_tokens)
            async with self.queue.slot(
                name[0], num_tokens, on_refused=lambda: self._give_up(admitted)
            ):
                raise AssertionError("the engine starts nothing")

    def _give_up(self, admitted: Admitted) -> None:
        self.admission.begin(admitted)

    def names(self) -> set[str]:
        return {name for name, task in self.waiting.items() if not task.done()}

    async def leave(self) -> None:
        for task in self.waiting.values():
            task.cancel()
        await asyncio.gather(*self.waiting.values(), return_exceptions=True)
        assert (self.admission.num_in_flight, self.queue.num_waiting) == (0, 0)


async def test_places_in_a_full_queue_are_shared_among_clients() -> None:
    crowd = Crowd(max_waiting=6)
    for i in range(6):
        await crowd.come(f"a{i}")
    with pytest.raises(Overloaded, match="6 requests wait"):
        await crowd.come("a6")
    for i in range(3):
        await crowd.come(f"b{i}")
    assert crowd.names() == {"a0", "a1", "a2", "b0", "b1", "b2"}
    for greedy in ("a7", "b3"):
        with pytest.raises(Overloaded):
            await crowd.come(greedy)
    await crowd.come("c0")
    await crowd.come("c1")
    assert sorted(name[0] for name in crowd.names()) == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(Overloaded, match="its places are shared among clients"):
        await crowd.waiting["a5"]
    await crowd.leave()


async def test_tokens_in_a_full_queue_are_shared_among_clients() -> None:
    crowd = Crowd(max_waiting=100, max_waiting_tokens=100)
    for i in range(4):
        await crowd.come(f"a{i}", 25)
    await crowd.come("b0", 30)
    assert crowd.names() == {"a0", "a1", "b0"}
    with pytest.raises(Overloaded, match="80 prompt tokens wait"):
        await crowd.come("c0", 60)
    await crowd.come("c1", 20)
    assert crowd.names() == {"a0", "a1", "b0", "c1"}
    await crowd.leave()
