"""The completions that one call asks for: each is a request of its own."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

from server.calls.call_record import CallRecord
from server.calls.generation import FinishInfo, Generation, GenerationEvent, PromptInfo
from server.serving.completions import seed_of
from server.serving.inference import Inference
from server.task_group import run_together

# Takes an event, and the index of the completion that it belongs to.
Take = Callable[[GenerationEvent, int], Awaitable[None]]


async def run_completions(
    inference: Inference,
    generation: Generation,
    count: int,
    take: Take,
    record: CallRecord,
    *,
    deadline: float,
    may_repeat: bool,
) -> None:
    """Run ``count`` completions at once, and hand their events to ``take`` as they come.

    Raises what :meth:`Inference.generate` raises; an error of one ends all.
    """
    record.begin(generation)

    async def run(generation: Generation, index: int) -> None:
        async with inference.generate(
            generation, deadline=deadline, may_repeat=may_repeat
        ) as events:
            async for event in events:
                # The record has the first completion, and the tokens of all.
                if index == 0 or not isinstance(event, PromptInfo | FinishInfo):
                    record.observe(event)
                await take(event, index)

    if count == 1:
        await run(generation, 0)
        return
    base = generation.request_id or uuid.uuid4().hex
    await run_together(
        run(
            replace(
                generation,
                request_id=f"{base}-{index}",
                sampling=replace(
                    generation.sampling, seed=seed_of(generation.sampling.seed, index)
                ),
            ),
            index,
        )
        for index in range(count)
    )
