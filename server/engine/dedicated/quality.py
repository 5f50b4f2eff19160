"""Quality of a level, measured with the log-probabilities that its engine reports."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.base import LayerSelection, SamplingOptions
from server.engine.prefix_cache import cache_salt
from server.engine.token_progress import TokenProgress
from server.engine.vllm_client import VllmClient
from server.task_group import run_together

# Requests of a measurement at a time; the rest of the batch is left to clients.
_MEASURING_REQUESTS = 16

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class WindowStatistics:
    """Statistics of the second half of one text window, given the first half.

    The elastic engine measures the same halves.
    """

    num_tokens: int
    # Summed, in nats.
    negative_log_likelihood: float
    # The most likely token at each position.
    most_likely: tuple[int, ...]

    def sums(self, reference: WindowStatistics | None) -> tuple[float | None, ...]:
        """Return this window's sums for :func:`pruning.quality.quality_of_windows`.

        The divergence is None: it needs the log-probabilities of the whole vocabulary.
        """
        own = float(self.num_tokens), self.negative_log_likelihood
        if reference is None:
            return *own, None, None
        pairs = zip(self.most_likely, reference.most_likely, strict=True)
        agreements = float(sum(mine == other for mine, other in pairs))
        return *own, agreements, None, reference.negative_log_likelihood


async def window_statistics(
    llm: VllmClient, windows: Sequence[Sequence[int]], depth: str, progress: TokenProgress
) -> list[WindowStatistics]:
    """Run the windows through the engine of a depth; return the statistics of each."""
    slots = asyncio.Semaphore(_MEASURING_REQUESTS)

    async def measure(window: Sequence[int]) -> WindowStatistics:
        async with slots:
            params = llm.sampling_params(SamplingOptions(max_tokens=1, temperature=0.0))
            params.detokenize = False
            request_id = f"measure-{next(_numbers)}"
            scores = await llm.prompt_scores(
                request_id,
                window,
                params,
                cache_salt=cache_salt(LayerSelection(), None),
                depth=depth,
                num_top=1,
            )
            scored = scores[len(window) // 2 - 1 :]
            progress.advance(len(window))
            return WindowStatistics(
                num_tokens=len(scored),
                negative_log_likelihood=-math.fsum(score.logprob for score in scored),
                most_likely=tuple(score.top[0].token_id for score in scored),
            )

    return await run_together(map(measure, windows))
