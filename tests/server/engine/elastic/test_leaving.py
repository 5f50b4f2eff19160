"""A request that its client has left, or whose deadline has passed, is gone with the next step."""

from __future__ import annotations

import asyncio
import time
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
    while process.status() != psutil.STATUS_STOPPED:
        await asyncio.sleep(0.01)
    await leaves.aclose()
    stood_still = time.monotonic()  # the clock of the engine's process, too

    llm: Any = engine._llm
    processor, load_logger = llm._llm.output_processor, llm._load_logger
    process_outputs, record = processor.process_outputs, load_logger.record
    made_at = 0.0
    num_running = []

    def noting_time(outputs: Any, timestamp: float, *others: Any, **more: Any) -> Any:
        nonlocal made_at
        made_at = timestamp
        return process_outputs(outputs, timestamp, *others, **more)

    def noting_load(scheduler_stats: Any, *others: Any, **more: Any) -> None:
        record(scheduler_stats, *others, **more)
        # What the engine had sent before may still be on its way.
        if scheduler_stats is not None and made_at > stood_still:
            num_running.append(scheduler_stats.num_running_reqs)

    processor.process_outputs, load_logger.record = noting_time, noting_load
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
