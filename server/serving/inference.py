"""Inference: generation, scoring and tokenization, from admission to the last token."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager

from server.calibration.policy_in_force import PolicyInForce
from server.calls.caller import current_caller
from server.calls.generation import (
    Generation,
    GenerationEvent,
    Prompt,
    PromptInfo,
    Scoring,
    ScoringResult,
)
from server.depth.autodepth import AutoDepth
from server.depth.depth_choice import RequestKind
from server.depth.served_depth import Reason, ServedDepth
from server.engine.base import (
    EVERYONE,
    CacheNamespace,
    Engine,
    EngineDead,
    GenerationDelta,
    GenerationRequest,
    SamplingOptions,
)
from server.errors import InvalidArgument
from server.serving.admission import Admission, Admitted
from server.serving.attempts import Attempts, without_lost_repair
from server.serving.engine_restarter import EngineRestarter
from server.serving.fair_queue import Claim, FairQueue, Slot
from server.serving.prompts import PromptReader
from server.serving.request_account import RequestAccount
from server.serving.request_runner import RequestRunner
from server.serving.result_check import ResultCheck
from server.serving.sampling import checked_sampling
from server.serving.service_state import ServiceState
from server.telemetry.metrics import Metrics


class Inference:
    """Runs requests under the policy in force.

    Each request is admitted, tokenized, given a depth, and handed to the engine when its turn has
    come. All methods raise the errors of :mod:`server.errors`, and belong to the thread of the
    event loop.
    """

    def __init__(
        self,
        engine: Engine,
        state: ServiceState,
        in_force: PolicyInForce,
        admission: Admission,
        prompts: PromptReader,
        queue: FairQueue,
        restarter: EngineRestarter,
        results: ResultCheck,
        auto: AutoDepth,
        metrics: Metrics,
        *,
        max_buffered_tokens: int | None,
        share_prefix_cache: bool,
        max_logprobs: int,
    ) -> None:
        """The options are described in :class:`server.serving.service.Service`."""
        self._engine = engine
        self._state = state
        self._in_force = in_force
        self._admission = admission
        self._prompts = prompts
        self._queue = queue
        self._restarter = restarter
        self._results = results
        self._auto = auto
        self._metrics = metrics
        self._max_buffered_tokens = max_buffered_tokens
        self._share_prefix_cache = share_prefix_cache
        self._max_logprobs = max_logprobs

    @asynccontextmanager
    async def generate(
        self,
        request: Generation,
        *,
        deadline: float = math.inf,
        may_repeat: bool = False,
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        """Run a request; its events are :class:`PromptInfo`, what steps add, :class:`FinishInfo`.

        ``deadline`` is a time of the monotonic clock. ``may_repeat``: nothing reaches the client
        before the end, so that a request of which nothing was generated may run once more when
        the engine has died. Leaving frees the engine.
        """
        arrived = time.monotonic()
        self._state.require_serving()
        with self._admit(request.request_id) as admitted, self._restarter.errors():
            claim = self._claim(admitted, deadline)
            prompt_ids = await self._prompts.read_to_generate(request.prompt, claim)
            self._admission.count_tokens(admitted, len(prompt_ids))
            sampling = checked_sampling(
                request.sampling, self._engine.model, len(prompt_ids), self._max_logprobs
            )
            # A depth that cannot be had is refused at once. The depth that the server chooses is
            # chosen when the request starts.
            _, served = self._in_force.policy.resolve(request.depth, request.prefill_depth)
            _check_prompt_scores(sampling, served)
            self._auto.observe_arrival()
            async with self._slot(admitted, served, claim) as slot:
                if self._queue.is_limited:
                    self._admission.begin(admitted)
                layers, served = self._in_force.policy.resolve(request.depth, request.prefill_depth)
                _check_prompt_scores(sampling, served)
                preface: list[GenerationEvent] = [
                    PromptInfo(admitted.request_id, len(prompt_ids), served, prompt_ids)
                ]
                if request.echo:
                    text = await self._prompts.text(request.prompt, prompt_ids, claim)
                    preface.append(GenerationDelta(text, ()))
                runner = RequestRunner(
                    self._engine,
                    GenerationRequest(
                        admitted.engine_id,
                        prompt_ids,
                        layers,
                        sampling,
                        self._cache_namespace(),
                        request.cache_salt,
                    ),
                    served,
                    arrived,
                    Attempts(self._restarter, slot, admitted, may_repeat=may_repeat),
                    self._account(admitted, slot, served),
                    max_buffered_tokens=self._max_buffered_tokens,
                )
                try:
                    with self._results.watching(layers, served.decode_layers, admitted.title):
                        async with aclosing(runner.events(preface)) as events:
                            yield events
                finally:
                    self._metrics.end(served.decode_layers, time.monotonic() - arrived)

    async def score(self, request: Scoring, *, deadline: float = math.inf) -> ScoringResult:
        """Return the log-probabilities of the tokens of the continuation; see :meth:`generate`."""
        self._state.require_serving()
        with self._admit(request.request_id) as admitted, self._restarter.errors():
            claim = self._claim(admitted, deadline)
            context_ids, ids = await self._prompts.read_to_score(request, claim)
            self._admission.count_tokens(admitted, len(context_ids) + len(ids))
            depths = request.depth, request.prefill_depth, RequestKind.SCORE
            _, served = self._in_force.policy.resolve(*depths)
            if served.reason in (Reason.AUTO, Reason.DEGRADED):
                self._auto.observe_score()
            async with self._slot(admitted, served, claim) as slot:
                self._admission.begin(admitted)
                layers, served = self._in_force.policy.resolve(*depths)
                attempts = Attempts(self._restarter, slot, admitted, may_repeat=True)
                while True:
                    attempts.begin()
                    layers, served = without_lost_repair(self._engine, layers, served)
                    try:
                        with self._results.watching(layers, served.decode_layers, admitted.title):
                            scores = await self._engine.score(
                                admitted.engine_id,
                                context_ids + ids,
                                len(context_ids) or 1,
                                layers,
                                self._cache_namespace(),
                            )
                        return ScoringResult(tuple(scores), served)
                    except EngineDead as error:
                        await attempts.survive(error)

    async def tokenize(
        self, prompt: Prompt, *, special_tokens: bool = True, deadline: float = math.inf
    ) -> tuple[list[int], list[str]]:
        """Return the ids and the texts of the prompt's tokens.

        It waits as other requests do, and counts as one of them.
        """
        self._state.require_started()
        with self._admit("") as admitted, self._restarter.errors():
            claim = self._claim(admitted, deadline)
            return await self._prompts.tokenize(prompt, claim, special_tokens=special_tokens)

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float = math.inf) -> str:
        """Return the text of tokens; it waits and counts as :meth:`tokenize` does."""
        self._state.require_started()
        with self._admit("") as admitted, self._restarter.errors():
            return await self._prompts.detokenize(token_ids, self._claim(admitted, deadline))

    def _cache_namespace(self) -> CacheNamespace | None:
        return EVERYONE if self._share_prefix_cache else current_caller().cache_namespace

    def _admit(self, request_id: str) -> AbstractContextManager[Admitted]:
        return self._admission.admit(request_id, current_caller().client)

    def _claim(self, admitted: Admitted, deadline: float) -> Claim:
        return Claim(admitted.client, deadline, lambda: self._admission.begin(admitted))

    def _slot(self, admitted: Admitted, served: ServedDepth, claim: Claim) -> Slot:
        return self._queue.slot(
            admitted.client,
            admitted.num_tokens,
            admitted.num_tokens * served.prefill_layers / self._in_force.policy.num_layers,
            deadline=claim.deadline,
            on_refused=claim.on_refused,
        )

    def _account(self, admitted: Admitted, slot: Slot, served: ServedDepth) -> RequestAccount:
        return RequestAccount(
            admitted,
            slot,
            served,
            self._in_force.policy.num_layers,
            admission=self._admission,
            auto=self._auto,
            metrics=self._metrics,
        )


def _check_prompt_scores(sampling: SamplingOptions, served: ServedDepth) -> None:
    """Raise :class:`InvalidArgument` where the prompt's scores would be those of another depth."""
    if sampling.prompt_logprobs is not None and served.prefill_layers != served.decode_layers:
        raise InvalidArgument(
            "output.prompt_logprobs",
            sampling.prompt_logprobs,
            f"none where the prompt runs at {served.prefill_layers} layers and generated tokens at "
            f"{served.decode_layers}: Score runs scored tokens as generated ones",
        )
