"""Measures how fast depths are with the engine that serves them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from server.depth.levels import DepthPair
from server.depth.measured import Speed
from server.depth.policy import DepthPolicy
from server.engine.base import Engine, GenerationRequest, LayerSelection, SamplingOptions
from server.task_group import run_together

NUM_STREAMS = 8
_TOKENS_PER_STREAM = 32
_PROMPT_TOKENS = 16
_ROUNDS = 2


class SpeedMeter:
    """Runs a small load at one depth after the other.

    The load is ``NUM_STREAMS`` greedy requests at a time. The depths take turns, so that a change
    of the machine's pace hits all of them, and the best of their rounds counts: whatever else ran
    only slowed them.
    """

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]]) -> None:
        """Take prompts from the beginnings of ``windows`` of token ids, at least one."""
        self._engine = engine
        self._windows = windows

    async def measure(
        self,
        policy: DepthPolicy,
        depths: Iterable[DepthPair],
        progress: Callable[[int, int], None],
    ) -> dict[DepthPair, Speed]:
        """Measure the throughput at each of ``depths`` and, if it can be, dense.

        Nothing is measured where that would be dense alone, and its speed is known.
        """
        pairs = list(dict.fromkeys(depths))
        if policy.can_have(policy.dense):
            pairs = list(dict.fromkeys([policy.dense, *pairs]))
            if len(pairs) == 1 and policy.dense in policy.speeds:
                return {}
        best = dict.fromkeys(pairs, 0.0)
        done = 0
        for _ in range(_ROUNDS):
            for pair in pairs:
                rate = await self._tokens_per_second(policy.selection(pair))
                best[pair] = max(best[pair], rate)
                done += 1
                progress(done, _ROUNDS * len(pairs))
        dense = best.get(policy.dense)
        return {
            pair: Speed(rate, None if dense is None else rate / dense, NUM_STREAMS)
            for pair, rate in best.items()
        }

    async def _tokens_per_second(self, layers: LayerSelection) -> float:
        prompts = [
            self._windows[stream % len(self._windows)][:_PROMPT_TOKENS]
            for stream in range(NUM_STREAMS)
        ]
        return await tokens_per_second(self._engine, prompts, _TOKENS_PER_STREAM, layers)


async def tokens_per_second(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, layers: LayerSelection
) -> float:
    """Return the throughput of greedy requests, one for each of ``prompts``, all at a time.

    Each generates ``num_tokens``, or as many as the context has room for.
    """
    started = time.perf_counter()
    counts = await run_together(
        count_tokens(engine, prompt, num_tokens, layers) for prompt in prompts
    )
    return sum(counts) / (time.perf_counter() - started)


async def count_tokens(
    engine: Engine, prompt_ids: Sequence[int], num_tokens: int, layers: LayerSelection
) -> int:
    """Run one such request, and return how many tokens it has generated."""
    room = engine.model.max_context - len(prompt_ids)
    request = GenerationRequest(
        request_id=f"speed-{uuid.uuid4().hex}",
        prompt_ids=prompt_ids,
        layers=layers,
        sampling=SamplingOptions(
            temperature=0.0, max_tokens=min(num_tokens, room), ignore_eos=True
        ),
    )
    return sum([len(delta.token_ids) async for delta in engine.generate(request)])
