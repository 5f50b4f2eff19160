"""The requests of a load, made from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.lengths import Lengths


@dataclass(frozen=True, slots=True)
class Request:
    """Greedy generation of exactly ``num_tokens`` tokens at ``depth``; None is full depth."""

    prompt_ids: tuple[int, ...]
    num_tokens: int
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of requests.

    Prompts are random tokens, so no two share a prefix and no prefix cache helps. Token ids are
    below ``vocab_size``; the first few ids, which tend to be special tokens, are left out.
    """

    prompt: Lengths
    output: Lengths
    vocab_size: int
    seed: int = 0

    def requests(self, count: int, *, depth: int | None = None) -> list[Request]:
        """Return the first ``count`` requests; the same seed gives the same ones at every depth."""
        generator = np.random.default_rng([self.seed, 2])
        first = min(8, self.vocab_size - 1)
        lengths = zip(
            self.prompt.draw(count, self.seed), self.output.draw(count, self.seed + 1), strict=True
        )
        return [
            Request(
                tuple(generator.integers(first, self.vocab_size, num_prompt).tolist()),
                num_tokens,
                depth,
            )
            for num_prompt, num_tokens in lengths
        ]

    def streams(
        self, num_streams: int, num_requests: int, *, depth: int | None = None
    ) -> list[list[Request]]:
        """Return the requests that each stream sends, one after another."""
        requests = self.requests(num_streams * num_requests, depth=depth)
        return [requests[stream::num_streams] for stream in range(num_streams)]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return the times, in seconds from the start, of ``count`` arrivals at ``rate`` per second."""
    if not rate > 0:
        raise ValueError(f"rate: got {rate}, allowed: more than 0 per second")
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count)
    return list(map(float, np.cumsum(gaps)))


def num_tokens(streams: Sequence[Sequence[Request]]) -> int:
    """Return the tokens that all requests generate together."""
    return sum(request.num_tokens for stream in streams for request in stream)
