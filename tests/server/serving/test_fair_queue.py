"""The fair queue: the order in which requests start."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import DeadlineTooSoon, FathomError, Overloaded, Unavailable
from server.serving.fair_queue import FairQueue, Slot, slots_for

MAX_COST = 10


class Requests:
    """Enters slots, and knows which of them run."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.running: list[tuple[str, Slot]] = []
        self.order: list[str] = []
        self.failures: dict[str, FathomError] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, name: str, client: str, cost: float = 1.0, **options: float) -> Slot:
        slot = self.queue.slot(client, 1, cost, **options)  # type: ignore[arg-type]
        self.tasks[name] = asyncio.create_task(self._enter(name, slot))
        await settle()
        return slot

    async def _enter(self, name: str, slot: Slot) -> None:
        try:
            await self.queue.enter(slot)
        except FathomError as error:
            self.failures[name] = error
            return
        self.order.append(name)
        self.running.append((name, slot))

    async def end(self, index: int = 0) -> None:
        self.running.pop(index)[1].end()
        await settle()


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_without_a_limit_everything_starts() -> None:
    requests = Requests(FairQueue())
    for i in range(50):
        await requests.add(str(i), "a")
    assert len(requests.running) == 50


async def test_a_client_with_few_requests_does_not_wait_for_one_with_many() -> None:
    requests = Requests(FairQueue(1))
    for i in range(100):
        await requests.add(f"many {i}", "many")
    await requests.add("few 0", "few")
    await requests.add("few 1", "few")
    for _ in range(6):
        await requests.end()
    assert requests.order[:5] == ["many 0", "few 0", "many 1", "few 1", "many 2"]


async def test_work_counts_not_requests() -> None:
    requests = Requests(FairQueue(1))
    for i in range(8):
        await requests.add(f"long {i}", "long", cost=3)
        await requests.add(f"short {i}", "short", cost=1)
    for _ in range(8):
        await requests.end()
    started = [name.split()[0] for name in requests.order]
    assert started.count("short") == 6
    assert started.count("long") == 3


async def test_what_was_generated_counts() -> None:
    requests = Requests(FairQueue(1))
    for i in range(8):
        await requests.add(f"wordy {i}", "wordy")
        await requests.add(f"brief {i}", "brief")
    for _ in range(8):
        name, slot = requests.running[0]
        slot.charge(3 if name.startswith("wordy") else 1)
        await requests.end()
    assert [name.split()[0] for name in requests.order].count("brief") == 6


async def test_idling_earns_no_credit() -> None:
    requests = Requests(FairQueue(1))
    await requests.add("seldom", "seldom")
    await requests.end()
    for i in range(20):
        await requests.add(f"busy {i}", "busy")
    for _ in range(10):
        await requests.end()
    for i in range(10):
        await requests.add(f"back {i}", "seldom")
    for _ in range(8):
        await requests.end()
    started = [name.split()[0] for name in requests.order[-8:]]
    assert started.count("back") == 4


async def test_leaving_while_waiting_and_at_the_moment_of_the_start() -> None:
    requests = Requests(FairQueue(1))
    await requests.add("first", "a")
    for name in ("second", "third", "fourth"):
        await requests.add(name, "a")
    requests.tasks["second"].cancel()
    await settle()
    assert requests.queue.num_waiting == 2
    requests.running.pop()[1].end()
    requests.tasks["third"].cancel()  # it has its place, but does not know yet
    await settle()
    assert requests.order == ["first", "fourth"]
    assert (requests.queue.num_waiting, requests.queue.num_running) == (0, 1)


async def test_pause_and_resume_and_failure() -> None:
    requests = Requests(FairQueue(1))
    requests.queue.pause()
    await requests.add("one", "a")
    assert requests.order == []
    requests.queue.resume()
    await settle()
    assert requests.order == ["one"]
    await requests.add("two", "a")
    await requests.add("three", "b")
    requests.queue.fail(lambda: Unavailable("no engine"))
    await settle()
    assert {str(error) for error in requests.failures.values()} == {"no engine"}
    assert set(requests.failures) == {"two", "three"}
    assert requests.queue.num_waiting == 0


async def test_another_slot_comes_before_the_rest_of_the_client() -> None:
    requests = Requests(FairQueue(1))
    for i in range(3):
        await requests.add(str(i), "a")
    requests.queue.pause()
    slot = requests.running.pop()[1]
    again = asyncio.create_task(slot.again())
    await settle()
    assert not again.done()
    requests.queue.resume()
    await settle()
    assert again.done()
    assert requests.order == ["0"]


async def test_room_is_made_at_the_cost_of_the_client_that_has_most() -> None:
    refused: list[str] = []
    requests = Requests(FairQueue(1))
    for i in range(6):
        await requests.add(f"a{i}", "a")
    await requests.add("b0", "b")
    slot = requests.queue.slot("a", 50, on_refused=lambda: refused.append("newest"))
    newest = asyncio.create_task(requests.queue.enter(slot))
    await settle()

    def retry_after(client: str) -> float:
        return {"a": 2.0, "c": 7.0}[client]  # the refused one is told its own

    def make_room(client: str, size: int, *, in_tokens: bool = False) -> bool:
        return requests.queue.make_room(
            client, size, in_tokens=in_tokens, retry_after={"a": 2.0}.__getitem__
        )

    assert not make_room("a", 1)  # its own requests are no room
    assert not make_room("c", 6)
    assert make_room("c", 5)
    assert refused == ["newest"]
    with pytest.raises(Overloaded) as caught:
        await newest
    assert caught.value.retry_after == 2.0
    assert not make_room("c", 5, in_tokens=True)
    assert make_room("c", 4, in_tokens=True)
    await settle()
    assert set(requests.failures) == {"a5"}


async def test_deadlines_that_cannot_be_met_are_refused_at_once() -> None:
    now = 0.0
    requests = Requests(FairQueue(1, clock=lambda: now))
    for i in range(60):
        await requests.add(str(i), "a")
    # Nothing has been measured: even a deadline that is close is given a chance.
    await requests.add("chance", "a", deadline=now + 0.001)
    assert requests.failures == {}
    for _ in range(30):
        now += 1.0
        await requests.end()
    # 30 more are before it, 1 s each; what could be done at twice the pace is tried.
    await requests.add("late", "a", deadline=now + 10)
    await requests.add("perhaps", "a", deadline=now + 20)
    await requests.add("other", "b", deadline=now + 0.001)
    await requests.add("past", "b", deadline=now - 1)
    assert {name: type(error) for name, error in requests.failures.items()} == {
        "late": DeadlineTooSoon,
        "past": DeadlineTooSoon,
    }
    assert "the deadline is in 10 s" in str(requests.failures["late"])


@given(st.integers(1, 6), st.integers(2, 4), st.randoms(use_true_random=False))
def test_backlogged_clients_get_equal_shares_and_no_place_is_idle(
    num_places: int, num_clients: int, rng: random.Random
) -> None:
    """Their service never differs by more than the work that can run at one time."""

    async def check() -> None:
        requests = Requests(FairQueue(num_places))
        served: defaultdict[str, float] = defaultdict(float)
        costs: dict[str, float] = {}
        counts: defaultdict[str, int] = defaultdict(int)

        async def add(client: str) -> None:
            name = f"{client} {counts[client]}"
            counts[client] += 1
            costs[name] = rng.uniform(0, MAX_COST / 2)
            await requests.add(name, client, cost=costs[name])

        clients = [f"c{i}" for i in range(num_clients)]
        for client in clients:
            for _ in range(num_places + 1):
                await add(client)
        for _ in range(60):
            assert requests.queue.num_running == num_places == len(requests.running)
            index = rng.randrange(num_places)
            name, slot = requests.running[index]
            client = name.split()[0]
            generated = rng.uniform(0, MAX_COST / 2)
            slot.charge(generated)
            served[client] += costs[name] + generated
            await add(client)
            await requests.end(index)
            if _ > num_places * num_clients:
                gap = max(served[c] for c in clients) - min(served[c] for c in clients)
                assert gap <= 2 * num_places * MAX_COST
        for client in clients:
            own = [name for name in requests.order if name.startswith(f"{client} ")]
            assert own == [f"{client} {i}" for i in range(len(own))]
        for task in requests.tasks.values():
            task.cancel()
        await asyncio.gather(*requests.tasks.values(), return_exceptions=True)

    asyncio.run(check())


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16, 256])
def test_the_engine_has_the_next_request_at_hand(max_num_seqs: int) -> None:
    assert max_num_seqs < slots_for(max_num_seqs) <= 3 * max_num_seqs
