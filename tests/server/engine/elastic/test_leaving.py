"""A request that its client has left, or whose deadline has passed, is gone with the next step."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil

from server.engine.base import GenerationRequest, LayerSelection, SamplingOptions
from server.engine.elastic.engine import ElasticEngine
from tests.server.engine.elastic.running_engine import running_engine


def request(request_id: str) -> GenerationRequest:
    sampling = SamplingOptions(temperature=0.0, max_tokens=400, ignore_eos=True)
    return GenerationRequest(request_id, [5, 6, 7], LayerSelection(), sampling)


async def leave(engine: ElasticEngine) -> list[int]:
    """Return how many requests ran in each step after one of two was left."""
    stays, leaves = engine.generate(request("stays")), engine.generate(request("leaves"))
    await asyncio.gather(anext(stays), anext(leaves))
    # While the engine stands still, it cannot run a step before it could know.
    (process_id,) = engine.process_ids
    process = psutil.Process(process_id)
    process.suspend()
    await leaves.aclose()
    await asyncio.sleep(0.5)  # what it had sent before arrives

    load_logger: Any = engine._llm._load_logger
    record, num_running = load_logger.record, []

    def noting(scheduler_stats: Any, *others: Any, **more: Any) -> None:
        record(scheduler_stats, *others, **more)
        if scheduler_stats is not None:
            num_running.append(scheduler_stats.num_running_reqs)

    load_logger.record = noting
    process.resume()
    await engine.ping()
    async for _ in stays:
        pass
    return num_running


def test_a_request_that_is_left_is_gone_with_the_next_step(demo_model: Path) -> None:
    with running_engine(demo_model) as running:
        num_running = running.run(leave(running.engine))
    # The step that was under way may have had both, and one that was made ready meanwhile.
    assert 2 not in num_running[2:]
    assert num_running.count(1) > 100
