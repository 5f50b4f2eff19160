"""Measures how depths write and choose, with the engine that serves them."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pruning.probes import (
    Continuations,
    Passage,
    Probes,
    ProbeTextError,
    choices,
    choosing,
    passages,
    pieces,
    writing,
)
from server.engine.base import (
    Engine,
    GenerationRequest,
    LayerSelection,
    ProgressCallback,
    SamplingOptions,
)
from server.engine.pace import present_gate
from server.task_group import run_together

# The design of the probes: whoever changes it raises the method number of their entries in
# server/state_keys.py.
NUM_PROMPTS = 16
PROMPT_TOKENS = 32
GENERATED_TOKENS = 48
NUM_PASSAGES = 64
CONTEXT_TOKENS = 24
CONTINUED_TOKENS = 8
_MIN_PROMPTS = 8
_MIN_PASSAGES = 16

# Requests at a time; the rest of the batch is left to clients.
_MEASURING_REQUESTS = 16

_DENSE = LayerSelection()

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one depth has written and chosen; None without that probe."""

    written: Continuations | None
    chosen: list[int] | None


class Prober:
    """Has the probes of one held-out text, and runs them with any layers left out."""

    def __init__(
        self, engine: Engine, windows: Sequence[Sequence[int]], start: Sequence[int]
    ) -> None:
        """Make the probes of ``windows`` of text; ``start`` are the tokens that begin any text.

        A probe that there is too little text or too short a context for is left out, and the log
        says what it takes.
        """
        self._engine = engine
        self._start = tuple(start)
        # The dense model is the same under every plan.
        self._dense: _Answers | None = None
        # Why a probe is left out, by its name.
        self.problems: dict[str, str] = {}
        self._prompts = self._if_possible("writing", lambda: self._writing_prompts(windows))
        self._passages = self._if_possible("choosing", lambda: self._choosing_passages(windows))

    async def run(
        self,
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
        *,
        has_dense: bool,
    ) -> list[Probes]:
        """Return what each of ``selections`` writes and chooses, compared with the dense model.

        ``has_dense``: whether the engine runs the dense model. Raises what
        :meth:`server.engine.base.Engine.generate` does.
        """
        if not self._prompts and not self._passages:
            return [Probes(None, None) for _ in selections]
        to_run = [layers for layers in dict.fromkeys(selections) if layers != _DENSE]
        runs_dense = has_dense and self._dense is None
        counter = _Counter(progress, self._num_requests * (len(to_run) + runs_dense))
        if runs_dense:
            self._dense = await self._answers(_DENSE, counter, has_dense=True)
        dense = self._dense if has_dense else None
        answers = {
            layers: await self._answers(layers, counter, has_dense=has_dense) for layers in to_run
        }
        if dense is not None:
            answers[_DENSE] = dense
        return [self._compare(answers[layers], dense) for layers in selections]

    @property
    def _num_requests(self) -> int:
        """The requests that one depth takes."""
        num_continuations = sum(len(passage.continuations) for passage in self._passages)
        return 2 * len(self._prompts) + num_continuations

    def _if_possible(self, probe: str, make: Callable[[], list[T]]) -> list[T]:
        try:
            return make()
        except ProbeTextError as error:
            logger.warning("%s is not measured: %s", probe, error)
            self.problems[probe] = str(error)
            return []

    def _writing_prompts(self, windows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        self._check_room(PROMPT_TOKENS + GENERATED_TOKENS)
        found = pieces(windows, PROMPT_TOKENS, at_least=_MIN_PROMPTS, at_most=NUM_PROMPTS)
        return [self._start + piece.token_ids for piece in found]

    def _choosing_passages(self, windows: Sequence[Sequence[int]]) -> list[Passage]:
        self._check_room(CONTEXT_TOKENS + CONTINUED_TOKENS)
        return passages(
            windows,
            num_context=CONTEXT_TOKENS,
            num_continued=CONTINUED_TOKENS,
            at_least=_MIN_PASSAGES,
            at_most=NUM_PASSAGES,
        )

    def _check_room(self, num_tokens: int) -> None:
        needed = len(self._start) + num_tokens + 1
        if (max_context := self._engine.model.max_context) < needed:
            raise ProbeTextError(
                f"max_context: got {max_context}, allowed: {needed} or more, which a prompt and "
                "its continuation take"
            )

    async def _answers(
        self, layers: LayerSelection, counter: _Counter, *, has_dense: bool
    ) -> _Answers:
        written = chosen = None
        if self._prompts:
            token_ids = await _at_most_at_once(
                [self._continue(prompt, layers, counter) for prompt in self._prompts]
            )
            losses = None
            if has_dense:
                pairs = zip(self._prompts, token_ids, strict=True)
                logprobs = await _at_most_at_once(
                    [self._logprob(prompt, ids, _DENSE, counter) for prompt, ids in pairs]
                )
                losses = tuple(-logprob for logprob in logprobs)
            written = Continuations(tuple(token_ids), losses)
        if self._passages:
            logprobs = await _at_most_at_once(
                [
                    self._logprob(self._start + passage.context, continuation, layers, counter)
                    for passage in self._passages
                    for continuation in passage.continuations
                ]
            )
            each = iter(logprobs)
            chosen = choices(
                [[next(each) for _ in passage.continuations] for passage in self._passages]
            )
        return _Answers(written, chosen)

    def _compare(self, level: _Answers, dense: _Answers | None) -> Probes:
        return Probes(
            writing=(
                None
                if level.written is None
                else writing(level.written, None if dense is None else dense.written)
            ),
            choosing=(
                None
                if level.chosen is None
                else choosing(self._passages, level.chosen, None if dense is None else dense.chosen)
            ),
        )

    async def _continue(
        self, prompt: tuple[int, ...], layers: LayerSelection, counter: _Counter
    ) -> tuple[int, ...]:
        request = GenerationRequest(
            request_id=f"probe-{uuid.uuid4().hex}",
            prompt_ids=prompt,
            layers=layers,
            sampling=SamplingOptions(temperature=0.0, max_tokens=GENERATED_TOKENS, ignore_eos=True),
        )
        token_ids: list[int] = []
        async for delta in self._engine.generate(request):
            token_ids += delta.token_ids
        counter.advance()
        return tuple(token_ids)

    async def _logprob(
        self,
        context: tuple[int, ...],
        continuation: tuple[int, ...],
        layers: LayerSelection,
        counter: _Counter,
    ) -> float:
        """Return the log-probability of the continuation, in nats."""
        scores = await self._engine.score(
            f"probe-{uuid.uuid4().hex}", context + continuation, len(context), layers
        )
        counter.advance()
        return math.fsum(score.logprob for score in scores)


class _Counter:
    """Reports how many of the requests have ended."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def advance(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


async def _at_most_at_once(requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run the requests, a few at a time; return their results in order.

    Each is a part of a measurement, and one after the other waits for the gate where there is one.
    """
    slots, turn, gate = asyncio.Semaphore(_MEASURING_REQUESTS), asyncio.Lock(), present_gate()

    async def run(request: Coroutine[Any, Any, T]) -> T:
        async with slots:
            if gate is not None:
                async with turn:
                    await gate()
            return await request

    try:
        return await run_together(map(run, requests))
    finally:
        for request in requests:
            request.close()
