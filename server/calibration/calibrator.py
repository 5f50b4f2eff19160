"""Measures layers and depths with the engine that serves them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pruning.fingerprint import text_fingerprint
from pruning.importance import ImportanceError
from pruning.plan import Plan
from pruning.quality import Quality, QualityError
from pruning.text import TextError, token_windows
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy, Speed
from server.engine.base import Engine, GenerationRequest, LayerSelection, SamplingOptions
from server.errors import FailedPrecondition, InvalidArgument

# Of calibration and quality text, in tokens.
WINDOW = 512

NUM_STREAMS = 8
_TOKENS_PER_STREAM = 32
_PROMPT_TOKENS = 16
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is: ``phase`` is importance, levels, quality or speed.

    At levels, engines are started for them.
    """

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


class Calibrator:
    """Measures one model: its layers on calibration text, its depths on held-out text."""

    def __init__(
        self,
        engine: Engine,
        *,
        model_fingerprint: str,
        tokenizer_fingerprint: str = "",
        versions: Mapping[str, str],
        texts: Sequence[str],
        max_tokens: int,
        held_out_texts: Sequence[str],
        max_held_out_tokens: int,
        every_depth: bool,
    ) -> None:
        """Measure with an engine that has been started.

        ``every_depth``: whether quality is measured at all depths rather than at the levels
        alone. Raises :class:`FailedPrecondition` where the held-out text has no tokens.
        """
        self._engine = engine
        self._model_fingerprint = model_fingerprint
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._versions = dict(versions)
        self._texts = texts
        self._max_tokens = max_tokens
        self._every_depth = every_depth
        try:
            self._held_out = self._windows(held_out_texts, max_held_out_tokens)
        except TextError as error:
            raise FailedPrecondition(f"the held-out text: {error}") from None

    async def measure_plan(
        self, on_progress: OnProgress, texts: Sequence[str] = (), max_tokens: int | None = None
    ) -> Plan:
        """Rank the layers on ``texts``, or on those of the server where there are none.

        Raises :class:`InvalidArgument` for texts without tokens and for too few tokens to
        measure on, :class:`FailedPrecondition` for a model whose states are not finite.
        """
        max_tokens = self._max_tokens if max_tokens is None else max_tokens
        if max_tokens < 2:
            raise InvalidArgument("max_tokens", max_tokens, "2 or more")
        texts = texts or self._texts
        try:
            windows = await asyncio.to_thread(self._windows, texts, max_tokens)
        except TextError as error:
            raise InvalidArgument("texts", list(texts), f"texts with tokens ({error})") from None
        with _measuring():
            importance = await self._engine.measure_importance(
                windows, _report(on_progress, "importance")
            )
        return Plan.from_importance(
            importance,
            model_fingerprint=self._model_fingerprint,
            text_fingerprint=text_fingerprint(texts),
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            versions=self._versions,
        )

    def depths_to_measure(self, policy: DepthPolicy) -> list[DepthPair]:
        """Return dense, the levels and, if so configured, all depths; the deepest first.

        Of these, only such that a request may have.
        """
        depths = set(self.depths_to_time(policy))
        if self._every_depth and policy.any_depth:
            depths |= {DepthPair(layers, layers) for layers in range(1, policy.num_layers + 1)}
        return sorted(depths, key=lambda pair: (-pair.decode_layers, -pair.prefill_layers))

    def depths_to_time(self, policy: DepthPolicy) -> list[DepthPair]:
        """Return dense, where a request may have it, and the levels."""
        dense = [policy.dense] if policy.can_have(policy.dense) else []
        return list(dict.fromkeys([*dense, *(level.depths for level in policy.levels)]))

    async def measure_quality(
        self, policy: DepthPolicy, depths: Sequence[DepthPair], on_progress: OnProgress
    ) -> dict[DepthPair, Quality]:
        """Measure each of ``depths`` on the held-out text, under the policy's plan."""
        if not depths:
            return {}
        with _measuring():
            qualities = await self._engine.measure_quality(
                self._held_out,
                [policy.selection(pair) for pair in depths],
                _report(on_progress, "quality"),
            )
        return dict(zip(depths, qualities, strict=True))

    async def measure_speed(
        self, policy: DepthPolicy, depths: Iterable[DepthPair], on_progress: OnProgress
    ) -> dict[DepthPair, Speed]:
        """Measure the throughput of a small load at each of ``depths`` and, if it can be, dense.

        The load is ``NUM_STREAMS`` greedy requests at a time, with prompts from the held-out
        text. The depths take turns, so that a change of the machine's pace hits all of them,
        and the best of their rounds counts: whatever else ran only slowed them.
        """
        pairs = list(dict.fromkeys(depths))
        if policy.can_have(policy.dense):
            pairs = list(dict.fromkeys([policy.dense, *pairs]))
            if len(pairs) == 1 and policy.dense in policy.speeds:
                return {}
        report = _report(on_progress, "speed")
        best = dict.fromkeys(pairs, 0.0)
        done = 0
        for _ in range(_ROUNDS):
            for pair in pairs:
                rate = await self._tokens_per_second(policy.selection(pair))
                best[pair] = max(best[pair], rate)
                done += 1
                report(done, _ROUNDS * len(pairs))
        dense = best.get(policy.dense)
        return {
            pair: Speed(rate, None if dense is None else rate / dense, NUM_STREAMS)
            for pair, rate in best.items()
        }

    async def _tokens_per_second(self, layers: LayerSelection) -> float:
        prompts = [
            self._held_out[stream % len(self._held_out)][:_PROMPT_TOKENS]
            for stream in range(NUM_STREAMS)
        ]
        started = time.perf_counter()
        tasks = [asyncio.create_task(self._count_tokens(prompt, layers)) for prompt in prompts]
        try:
            num_tokens = sum(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return num_tokens / (time.perf_counter() - started)

    async def _count_tokens(self, prompt_ids: Sequence[int], layers: LayerSelection) -> int:
        room = self._engine.model.max_context - len(prompt_ids)
        request = GenerationRequest(
            request_id=f"speed-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids,
            layers=layers,
            sampling=SamplingOptions(
                temperature=0.0, max_tokens=min(_TOKENS_PER_STREAM, room), ignore_eos=True
            ),
        )
        return sum([len(delta.token_ids) async for delta in self._engine.generate(request)])

    def _windows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        return text_windows(
            self._engine.tokenize, texts, self._engine.model.max_context, max_tokens
        )


class Tokenize(Protocol):
    """Turns a text into token ids, with the special ones of a text's beginning or without."""

    def __call__(self, text: str, *, special_tokens: bool = True) -> list[int]: ...


def text_windows(
    tokenize: Tokenize, texts: Iterable[str], max_context: int, max_tokens: int
) -> list[list[int]]:
    """Cut ``texts`` into windows, each of which begins as a text of its own would.

    Raises :class:`TextError` where they have no tokens.
    """
    start = tokenize("")
    window = min(WINDOW, max_context - 1) - len(start)
    documents = (tokenize(text, special_tokens=False) for text in texts)
    return [start + ids for ids in token_windows(documents, window, max_tokens)]


def _report(on_progress: OnProgress, phase: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(Progress(phase, done, total))


@contextmanager
def _measuring() -> Iterator[None]:
    try:
        yield
    except (ImportanceError, QualityError) as error:
        raise FailedPrecondition(f"this model cannot be measured on this text: {error}") from error
