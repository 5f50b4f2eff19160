"""The service: admits requests, decides their depth and runs them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing

from pruning.plan import Plan
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.policy_updates import PolicyUpdates
from server.calls.caller import current_caller
from server.calls.generation import (
    Generation,
    GenerationEvent,
    Prompt,
    PromptInfo,
    Scoring,
    ScoringResult,
)
from server.depth.auto_rules import AutoRules, check_rules
from server.depth.autodepth import AutoDepth
from server.depth.levels import LevelSpec
from server.depth.policy import DepthPolicy, ServedDepth
from server.engine.base import (
    EVERYONE,
    CacheNamespace,
    Engine,
    EngineDead,
    GenerationDelta,
    GenerationRequest,
    LoadInfo,
    ModelInfo,
)
from server.errors import Unavailable
from server.serving.admission import Admission, Admitted
from server.serving.engine_restarter import EngineRestarter
from server.serving.fair_queue import FairQueue, Slot
from server.serving.prompts import PromptReader
from server.serving.request_runner import RequestRunner
from server.serving.sampling import checked_sampling
from server.serving.service_state import ENGINE_DEAD, ServiceState, State, Status
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Between two looks at the load.
_CHOICE_SECONDS = 0.5
# Of the client's share of the engine, in prompt tokens of full depth: twice one, as in the paper
# that the queue follows, since a generated token takes a step of its own.
_GENERATED_TOKEN_COST = 2.0


class Service:
    """Serves one model at any depth.

    Made in state STARTING, in which it refuses all requests, so that the transport can listen
    while the model loads; :meth:`open` starts to serve. All methods belong to the thread of the
    event loop.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        max_running: int | None = None,
        max_waiting: int = 1024,
        max_waiting_tokens: int | None = None,
        max_unread: int | None = None,
        share_prefix_cache: bool = False,
        grace_seconds: float = 30.0,
        engine_timeout_seconds: float = 0.0,
        auto_rules: AutoRules | None = None,
        max_logprobs: int = 20,
        version: str = "",
        save: Callable[[DepthPolicy], None] | None = None,
        poll_seconds: float = 1.0,
        first_restart_delay: float = 0.5,
        max_restart_delay: float = 30.0,
    ) -> None:
        """Serve with ``engine``, once it has been started.

        The engine is given ``max_running`` requests at a time; None: all. ``max_unread`` is what
        a client may leave unread of a stream, in tokens and log-probabilities.
        ``share_prefix_cache``: clients trust each other, and share what is cached. An engine that
        does not answer for ``engine_timeout_seconds`` is started again, unless that is 0.
        ``max_logprobs`` is the engine's limit. ``save`` is called, in a thread, with every
        policy that :meth:`calibrate` and :meth:`set_levels` have measured, to keep it.
        """
        self.metrics = metrics
        self._engine = engine
        self._queue = FairQueue(max_running)
        self._admission = Admission(self._queue, max_waiting, max_waiting_tokens)
        self._max_unread = max_unread
        self._share_prefix_cache = share_prefix_cache
        self._grace_seconds = grace_seconds
        self._max_logprobs = max_logprobs
        self._version = version
        self._save = save
        self._life = ServiceState(metrics)
        self._model: ModelInfo | None = None
        self._policy: DepthPolicy | None = None
        self._updates: PolicyUpdates | None = None
        self._prompts = PromptReader(engine)
        self._restarter = EngineRestarter(
            engine,
            self._life,
            self._queue,
            metrics,
            timeout_seconds=engine_timeout_seconds,
            poll_seconds=poll_seconds,
            first_delay=first_restart_delay,
            max_delay=max_restart_delay,
        )
        self._auto = AutoDepth(auto_rules or AutoRules())
        self._tasks: list[asyncio.Task[None]] = []
        metrics.watch_engine(lambda: engine.is_alive, self._load, engine.can_run)

    # State

    @property
    def state(self) -> State:
        return self._life.state

    async def state_after(self, seen: State) -> State:
        """Return the state as soon as it is not ``seen``; states that were brief are missed."""
        return await self._life.state_after(seen)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name what the start is doing meanwhile, and record how long it took."""
        return self._life.phase(name)

    def open(self, policy: DepthPolicy, calibrator: Calibrator) -> None:
        """Begin to serve; the engine has been started, and is watched from now on."""
        self._model = self._engine.model
        self._updates = PolicyUpdates(
            self._engine,
            calibrator,
            present=lambda: self.policy,
            install=self._install,
            save=self._save,
            engine_errors=self._restarter.errors,
        )
        self._install(policy)
        self.set_auto_rules(self._auto.rules)
        self._life.startup_phase = ""
        loop = asyncio.get_running_loop()
        self.metrics.watch_tasks(lambda: len(asyncio.all_tasks(loop)))
        for coroutine in (self._follow_load(), *self._restarter.watches()):
            self._tasks.append(asyncio.create_task(coroutine))
        if self.state is State.STARTING:
            self._life.turn_to(State.SERVING)

    async def drain(self, grace_seconds: float | None = None) -> int:
        """Refuse new requests and wait for those in flight; return how many are left.

        Waits at most ``grace_seconds``, by default those of the settings.
        """
        self._life.turn_to(State.DRAINING)
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        try:
            await asyncio.wait_for(self._admission.idle(), grace)
        except TimeoutError:
            logger.warning("%d requests did not end in %g s", self._admission.num_in_flight, grace)
        return self._admission.num_in_flight

    async def close(self) -> None:
        """Stop watching the engine, whose shutdown is up to the caller."""
        self._life.turn_to(State.DRAINING)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._prompts.close()

    def status(self) -> Status:
        return Status(
            state=self.state,
            startup_phase=self._life.startup_phase,
            startup_seconds=dict(self._life.startup_seconds),
            load=self._load(),
            uptime=self._life.uptime,
            num_engine_restarts=self._restarter.num_restarts,
            version=self._version,
            auto_level="" if self._policy is None else self._policy.present_level,
        )

    # Requests

    async def generate(
        self,
        request: Generation,
        *,
        deadline: float = math.inf,
        resubmit: bool = False,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield :class:`PromptInfo`, what the engine's steps add, and :class:`FinishInfo`.

        ``deadline`` is a time of the monotonic clock. ``resubmit``: nothing reaches the client
        before the end, so that a request of which nothing was generated may run once more when
        the engine has died. Closing the iterator frees the engine. Raises the errors of
        :mod:`server.errors`.
        """
        arrived = time.monotonic()
        self._life.require_serving()
        with self._admit(request.request_id) as admitted, self._restarter.errors():
            prompt_ids = await self._prompts.read_to_generate(request.prompt)
            self._admission.count_tokens(admitted, len(prompt_ids))
            sampling = checked_sampling(
                request.sampling, self.model, len(prompt_ids), self._max_logprobs
            )
            # What is wrong is told at once; what the server chooses, when the request starts.
            _, served = self.policy.resolve(request.depth, request.prefill_depth)
            self._auto.observe_arrival()
            async with self._slot(admitted, served, deadline) as slot:
                layers, served = self.policy.resolve(request.depth, request.prefill_depth)
                yield PromptInfo(admitted.request_id, len(prompt_ids), served)
                if request.echo:
                    yield GenerationDelta(self._prompts.text(request.prompt, prompt_ids), ())
                cost = _GENERATED_TOKEN_COST * served.decode_layers / self.policy.num_layers

                def on_tokens(num_tokens: int) -> None:
                    self._admission.begin(admitted)
                    slot.charge(cost * num_tokens)

                run = RequestRunner(
                    GenerationRequest(
                        admitted.request_id, prompt_ids, layers, sampling, self._cache_namespace()
                    ),
                    served,
                    arrived,
                    self.metrics,
                    on_tokens=on_tokens,
                    on_latency=self._auto.observe,
                    on_end=slot.end,
                    max_unread=self._max_unread,
                )
                try:
                    async with aclosing(self._run(run, slot, resubmit=resubmit)) as events:
                        async for event in events:
                            yield event
                finally:
                    self.metrics.end(served.decode_layers, time.monotonic() - arrived)

    async def score(self, request: Scoring, *, deadline: float = math.inf) -> ScoringResult:
        """Return the log-probabilities of the tokens of the continuation; see :meth:`generate`."""
        self._life.require_serving()
        with self._admit(request.request_id) as admitted, self._restarter.errors():
            context_ids, ids = await self._prompts.read_to_score(request)
            self._admission.count_tokens(admitted, len(context_ids) + len(ids))
            _, served = self.policy.resolve(request.depth, request.prefill_depth)
            async with self._slot(admitted, served, deadline) as slot:
                layers, served = self.policy.resolve(request.depth, request.prefill_depth)
                resubmit = True
                while True:
                    num_restarts = self._restarter.num_restarts
                    try:
                        scores = await self._engine.score(
                            admitted.request_id,
                            context_ids + ids,
                            len(context_ids) or 1,
                            layers,
                            self._cache_namespace(),
                        )
                        return ScoringResult(tuple(scores), served)
                    except EngineDead as error:
                        self._restarter.note_death(num_restarts)
                        if not resubmit:
                            raise Unavailable(ENGINE_DEAD) from error
                    resubmit = False
                    await slot.again()

    async def tokenize(
        self, prompt: Prompt, *, special_tokens: bool = True
    ) -> tuple[list[int], list[str]]:
        """Return the ids and the texts of the prompt's tokens.

        It waits as other requests do, and counts as one of them.
        """
        self._require_started()
        with self._admit(""), self._restarter.errors():
            ids = await self._prompts.tokenize(prompt, special_tokens=special_tokens)
            return ids, await self._prompts.token_texts(ids)

    # Control

    @property
    def model(self) -> ModelInfo:
        """The model that is served; raises :class:`Unavailable` until it is known."""
        self._require_started()
        assert self._model is not None
        return self._model

    @property
    def model_name(self) -> str:
        """The name of the model, empty until it is known."""
        return "" if self._model is None else self._model.name

    @property
    def engine_name(self) -> str:
        return self._engine.name

    @property
    def policy(self) -> DepthPolicy:
        """The policy in force; raises :class:`Unavailable` until there is one."""
        self._require_started()
        assert self._policy is not None
        return self._policy

    @property
    def auto_rules(self) -> AutoRules:
        return self._auto.rules

    def set_auto_rules(self, rules: AutoRules, level: str | None = None) -> None:
        """Choose what requests get that leave the depth to the server.

        ``level`` is the one without load; None: the first of the rules, else the present one.
        Raises :class:`UnknownLevel`, and :class:`InvalidArgument`, naming ``policy.ladder``.
        """
        policy = self.policy
        check_rules(policy, rules, "policy.ladder")
        if level is None:
            level = rules.levels[0] if rules.levels else policy.auto_level
        policy = policy.with_auto_level(level).with_auto_by_default(rules.by_default)
        self._auto.set_rules(rules)
        self._install(policy)

    async def calibrate(
        self, texts: Sequence[str] = (), max_tokens: int | None = None
    ) -> AsyncGenerator[Progress | Plan, None]:
        """Rank the layers anew and measure the levels; yield progress, then the plan in force.

        Closing the iterator before the plan came leaves everything as it was. Raises
        :class:`FailedPrecondition` while another measurement runs. Where levels have engines of
        their own, those of the new plan are started beside the old ones, which end with their
        last request: without the memory for both that raises :class:`FailedPrecondition`, too.
        """
        self._life.require_serving()
        assert self._updates is not None
        async with aclosing(self._updates.calibrate(texts, max_tokens)) as events:
            async for event in events:
                yield event

    async def set_levels(
        self, specs: Sequence[LevelSpec], default_level: str | None = None
    ) -> DepthPolicy:
        """Measure the levels that are new, then replace all levels at once.

        Engines that new levels need are started before, those that no level needs any more end
        with their last request. Raises :class:`InvalidArgument`, naming ``levels[i]``, and
        :class:`FailedPrecondition` while another measurement runs and where a level's engine
        cannot be started; nothing is replaced then.
        """
        self._life.require_serving()
        assert self._updates is not None
        return await self._updates.set_levels(specs, default_level)

    @property
    def is_measuring(self) -> bool:
        """Whether :meth:`calibrate` or :meth:`set_levels` is at work."""
        return self._updates is not None and self._updates.is_running

    # Inside

    async def _run(
        self, run: RequestRunner, slot: Slot, *, resubmit: bool
    ) -> AsyncGenerator[GenerationEvent, None]:
        while True:
            num_restarts = self._restarter.num_restarts
            try:
                async with aclosing(run.events(self._engine)) as events:
                    async for event in events:
                        yield event
                return
            except EngineDead as error:
                self._restarter.note_death(num_restarts)
                if not resubmit or run.has_begun:
                    raise Unavailable(ENGINE_DEAD) from error
            # Once: what has killed two engines may be this request.
            resubmit = False
            await slot.again()

    def _cache_namespace(self) -> CacheNamespace | None:
        return EVERYONE if self._share_prefix_cache else current_caller().cache_namespace

    def _admit(self, request_id: str) -> AbstractContextManager[Admitted]:
        return self._admission.admit(request_id, current_caller().client)

    def _slot(self, admitted: Admitted, served: ServedDepth, deadline: float) -> Slot:
        return self._queue.slot(
            admitted.client,
            admitted.num_tokens,
            admitted.num_tokens * served.prefill_layers / self.policy.num_layers,
            deadline=deadline,
            on_refused=lambda: self._admission.begin(admitted),
        )

    async def _follow_load(self) -> None:
        while True:
            await asyncio.sleep(_CHOICE_SECONDS)
            queue, rung = self._queue, self._auto.rung
            level = self._auto.choose(
                self.policy,
                num_waiting=queue.num_waiting,
                longest_wait=queue.longest_wait(),
                utilization=queue.utilization,
            )
            if level.name != self.policy.present_level:
                self._install(self.policy.with_present_level(level.name))
            if self._auto.rung != rung:
                self.metrics.count_policy_change(down=self._auto.rung > rung)

    def _require_started(self) -> None:
        if self._policy is None:
            raise self._life.starting()

    def _load(self) -> LoadInfo:
        try:
            load = self._engine.load()
        except EngineDead:
            load = LoadInfo(0, 0)
        return LoadInfo(load.num_running, load.num_waiting + self._queue.num_waiting)

    def _install(self, policy: DepthPolicy) -> None:
        self._policy = policy
        self.metrics.set_policy(policy)
