"""A small deterministic engine in memory.

Its tokens are bytes, chosen by a hash of what came before and of the layers that are left out,
so that every mistake in either shows. Tests hold it, and kill it, where they please.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pruning.metrics import DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality
from server.engine.base import (
    CacheNamespace,
    EngineDead,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    IsEnough,
    LayerSelection,
    LoadInfo,
    ModelInfo,
    ProgressCallback,
    TokenScore,
    never_enough,
)
from server.engine.measuring import importance_parts
from server.errors import FailedPrecondition

BOS, EOS = 256, 257
NUM_LAYERS = 8
MAX_CONTEXT = 4096
MODEL = ModelInfo(
    name="toy",
    architecture="ToyForCausalLM",
    dtype="float32",
    quantization="",
    num_layers=NUM_LAYERS,
    vocab_size=258,
    max_context=MAX_CONTEXT,
    max_characters_per_token=1,
)


def next_token(ids: Sequence[int], layers: LayerSelection) -> int:
    """Return the greedy choice after ``ids``: a letter, or one time in 32 the end."""
    digest = hashlib.blake2b(repr((tuple(ids), layers)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return EOS if number % 32 == 0 else ord("a") + number // 32 % 26


def logprob(ids: Sequence[int], token_id: int, layers: LayerSelection) -> float:
    """Return a log-probability that depends on everything it should depend on."""
    digest = hashlib.blake2b(repr((tuple(ids), token_id, layers)).encode(), digest_size=4).digest()
    return -int.from_bytes(digest, "little") / 2**30


def text_of(token_id: int) -> str:
    return "" if token_id >= BOS else bytes([token_id]).decode("ascii", errors="replace")


def toy_sums(scores: Sequence[float], num_tokens: int) -> DensePassSums:
    """What tokens of these influences add up to, which differ by 1 % or so."""
    num_layers = len(scores)
    moments = []
    for layer, score in enumerate(scores):
        sums = [float(num_tokens)]
        for value in (score, 0.5 - 0.01 * layer, 10.0 + layer):
            sums += [value * num_tokens, 1.0001 * value**2 * num_tokens]
        moments.append(sums)
    angles = [[abs(i - j) / 10 for j in range(num_layers + 1)] for i in range(num_layers + 1)]
    return DensePassSums(moments, angles, 1)


class ToyEngine:
    """See the module. It honours the sampling options that end a request, and logprobs."""

    name = "toy"
    serves_any_depth = True
    restarts_itself = False

    def __init__(self) -> None:
        self.on_restart: Callable[[], None] = lambda: None
        # Selections that were prepared and have not been released.
        self.prepared: set[LayerSelection] = set()
        self.score_namespaces: list[CacheNamespace | None] = []
        # How many of the next preparations fail.
        self.num_failing_preparations = 0
        # While it is clear, no token is made and nothing is measured.
        self.gate = asyncio.Event()
        self.gate.set()
        # While it is clear, the engine cannot start.
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.requests: list[GenerationRequest] = []
        # Ids of requests that were closed or cancelled before their end.
        self.freed: list[str] = []
        self.num_steps = 0
        self.num_starts = 0
        # So many of the next starts fail.
        self.num_failing_starts = 0
        self._alive = False
        self._changed = asyncio.Condition()
        self._running: set[str] = set()
        # As many requests as were in the engine at one time.
        self.max_running = 0
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        if self.num_failing_starts:
            self.num_failing_starts -= 1
            raise RuntimeError("no memory for the model")
        await self.start_gate.wait()
        self.num_starts += 1
        self._alive = True
        self._death = asyncio.get_running_loop().create_future()

    async def shutdown(self) -> None:
        self._alive = False

    async def prepare(
        self, plan: Plan, levels: Mapping[str, LayerSelection], progress: ProgressCallback
    ) -> None:
        if self.num_failing_preparations:
            self.num_failing_preparations -= 1
            raise FailedPrecondition("depth 5: no memory for it")
        self.prepared |= set(levels.values())

    def release_others(self, selections: Iterable[LayerSelection]) -> None:
        self.prepared &= set(selections)

    def can_run(self, layers: LayerSelection) -> bool:
        return self._alive

    def die(self) -> None:
        """End like a killed process: every request that waits for a token fails."""
        self._alive = False
        self._death.set_result(None)

    async def until_running(self, num_requests: int) -> None:
        """Return when ``num_requests`` requests are in the engine."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._running) == num_requests)

    async def until_freed(self, request_id: str | None = None) -> None:
        """Return when that request was freed before its end; None: when any was."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: bool(self.freed) if request_id is None else request_id in self.freed
            )

    @property
    def model(self) -> ModelInfo:
        return MODEL

    @property
    def is_alive(self) -> bool:
        return self._alive

    @property
    def process_ids(self) -> Sequence[int]:
        return ()

    async def ping(self) -> None:
        self._require_alive()

    def load(self) -> LoadInfo:
        return LoadInfo(len(self._running), 0)

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        self._require_alive()
        return [BOS] * special_tokens + list(text.encode())

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if any(message["role"] == "nobody" for message in messages):
            raise FailedPrecondition("model toy has no chat template; send a prompt or token ids")
        return self.tokenize("".join(f"{m['role']}:{m['content']}\n" for m in messages))

    def detokenize_prompt(self, token_ids: Sequence[int]) -> str:
        return "".join(self.token_texts(token_ids))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [text_of(token_id) for token_id in token_ids]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self.requests.append(request)
        await self._enter(request.request_id)
        finished = False
        try:
            async with aclosing(self._deltas(request)) as deltas:
                async for delta in deltas:
                    finished = delta.finish_reason is not None
                    yield delta
        finally:
            await self._leave(request.request_id, finished)

    async def score(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_context: int,
        layers: LayerSelection,
        cache_namespace: CacheNamespace | None = None,
    ) -> list[TokenScore]:
        self.score_namespaces.append(cache_namespace)
        await self._enter(request_id)
        finished = False
        try:
            await self._step()
            finished = True
        finally:
            await self._leave(request_id, finished)
        return [
            TokenScore(token_ids[i], logprob(token_ids[:i], token_ids[i], layers), "")
            for i in range(num_context, len(token_ids))
        ]

    async def measure_importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        total = sum(map(len, windows))
        done = 0
        scores = [-logprob(windows[0], layer, LayerSelection()) for layer in range(NUM_LAYERS)]
        groups: list[DensePassSums] = []
        for part in importance_parts(windows):
            for group in part:
                await self._step()
                num_tokens = sum(map(len, group))
                done += num_tokens
                progress(done, total)
                groups.append(toy_sums(scores, num_tokens))
            if await is_enough(groups):
                break
        return groups

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        qualities = []
        for i, layers in enumerate(selections, start=1):
            await self._step()
            num_left_out = (len(layers.prefill_skips) + len(layers.decode_skips)) / 2
            qualities.append(
                Quality(
                    perplexity=10 * math.exp(0.1 * num_left_out),
                    perplexity_stderr=0.5,
                    agreement=1 - num_left_out / 10,
                    kl_nats=num_left_out / 100,
                    num_tokens=sum(len(window) // 2 for window in windows),
                )
            )
            progress(i, len(selections))
        return qualities

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        sampling = request.sampling
        assert sampling.max_tokens is not None
        ids, text = list(request.prompt_ids), ""
        for i in range(sampling.max_tokens):
            await self._step()
            token_id = next_token(ids, request.layers)
            if token_id == EOS and (sampling.ignore_eos or i < (sampling.min_tokens or 0)):
                token_id = ord(".")
            before, ids = ids, [*ids, token_id]
            text += text_of(token_id)
            stopped_by: str | int | None = None
            reason = None
            if token_id in sampling.stop_token_ids:
                reason, stopped_by = FinishReason.STOP, token_id
            elif stops := [string for string in sampling.stop if text.endswith(string)]:
                reason, stopped_by = FinishReason.STOP, stops[0]
            elif token_id == EOS:
                reason = FinishReason.STOP
            elif i + 1 == sampling.max_tokens:
                reason = FinishReason.LENGTH
            yield GenerationDelta(
                text=text_of(token_id),
                token_ids=(token_id,),
                scores=self._scores(before, token_id, request)
                if sampling.logprobs is not None
                else (),
                num_cached_tokens=1 if i == 0 else 0,
                queue_seconds=0.25 if i == 0 else 0.0,
                finish_reason=reason,
                stopped_by=stopped_by,
            )
            if reason is not None:
                return

    def _scores(
        self, ids: Sequence[int], token_id: int, request: GenerationRequest
    ) -> tuple[TokenScore, ...]:
        top = tuple(
            TokenScore(other, logprob(ids, other, request.layers), text_of(other))
            for other in range(ord("a"), ord("a") + (request.sampling.logprobs or 0))
        )
        score = logprob(ids, token_id, request.layers)
        return (TokenScore(token_id, score, text_of(token_id), top),)

    async def _step(self) -> None:
        """Wait for the gate; raise :class:`EngineDead` once the engine has died."""
        await asyncio.sleep(0)
        self.num_steps += 1
        if not self.gate.is_set() and not self._death.done():
            opened = asyncio.ensure_future(self.gate.wait())
            either: list[asyncio.Future[Any]] = [opened, self._death]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                opened.cancel()
        self._require_alive()

    def _require_alive(self) -> None:
        if not self._alive:
            raise EngineDead("killed")

    async def _enter(self, request_id: str) -> None:
        self._require_alive()
        async with self._changed:
            self._running.add(request_id)
            self.max_running = max(self.max_running, len(self._running))
            self._changed.notify_all()

    async def _leave(self, request_id: str, finished: bool) -> None:
        async with self._changed:
            self._running.discard(request_id)
            if not finished:
                self.freed.append(request_id)
            self._changed.notify_all()


def expected_tokens(
    prompt_ids: Sequence[int], layers: LayerSelection, num_tokens: int
) -> list[int]:
    """Return what a request for ``num_tokens`` generates that ignores the end of the text."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_id = next_token(ids, layers)
        ids.append(ord(".") if token_id == EOS else token_id)
    return ids[len(prompt_ids) :]
