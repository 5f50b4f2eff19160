"""The service: admits requests, decides their depth, runs them, and keeps the engine alive."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from pruning.plan import Plan
from server.admission import Admission, Admitted
from server.auto_rules import AutoRules, check_rules
from server.autodepth import AutoDepth
from server.calibration import Calibrator, Progress
from server.caller import current_caller
from server.engine.base import (
    Engine,
    EngineDead,
    GenerationDelta,
    GenerationRequest,
    LoadInfo,
    ModelInfo,
    SamplingOptions,
)
from server.errors import FailedPrecondition, InvalidArgument, Unavailable
from server.fair_queue import FairQueue, Turn
from server.generation import (
    ChatPrompt,
    Generation,
    GenerationEvent,
    Prompt,
    PromptInfo,
    Scoring,
    ScoringResult,
    TextPrompt,
)
from server.levels import LevelSpec, check_levels
from server.metrics import Metrics
from server.policy import DepthPolicy, ServedDepth
from server.prompts import PromptReader, field_of
from server.run import Run
from server.supervisor import Supervisor
from server.watchdog import Watchdog

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Between two looks at the load.
_CHOICE_SECONDS = 0.5
_ENGINE_DEAD = "the engine has died; it is being started again"
# Of the client's share of the engine, in prompt tokens of full depth: twice one, as in the paper
# that the queue follows, since a generated token takes a step of its own.
_GENERATED_TOKEN_COST = 2.0


class State(enum.Enum):
    """What a service is doing."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    ENGINE_DOWN = "engine down"


@dataclass(frozen=True, slots=True)
class Status:
    """A service at this moment; times in seconds."""

    state: State
    # What is being done to get ready; empty once it is.
    startup_phase: str
    startup_seconds: dict[str, float]
    load: LoadInfo
    uptime: float
    num_engine_restarts: int
    version: str
    # Of requests that leave the depth to the server, at present; empty until it is known.
    auto_level: str


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
        a client may leave unread of a stream, in tokens and log-probabilities. An engine that
        does not answer for ``engine_timeout_seconds`` is started again, unless that is 0.
        ``max_logprobs`` is the engine's limit. ``save`` is called, in a thread, with every
        policy that :meth:`calibrate` and :meth:`set_levels` have measured, to keep it.
        """
        self.metrics = metrics
        self._engine = engine
        self._queue = FairQueue(max_running)
        self._admission = Admission(self._queue, max_waiting, max_waiting_tokens)
        self._max_unread = max_unread
        self._grace_seconds = grace_seconds
        self._max_logprobs = max_logprobs
        self._version = version
        self._save = save
        self._state = State.STARTING
        self._state_changed = asyncio.Event()
        self._startup_phase = "initializing"
        self._startup_seconds: dict[str, float] = {}
        self._created = time.monotonic()
        self._num_engine_restarts = 0
        self._model: ModelInfo | None = None
        self._policy: DepthPolicy | None = None
        self._calibrator: Calibrator | None = None
        self._calibrating = asyncio.Lock()
        self._prompts = PromptReader(engine)
        self._supervisor = Supervisor(
            engine,
            self._engine_died,
            self._engine_restarted,
            self._restart_failed,
            poll_seconds=poll_seconds,
            first_delay=first_restart_delay,
            max_delay=max_restart_delay,
        )
        self._watchdog = (
            Watchdog(engine, engine_timeout_seconds)
            if engine_timeout_seconds and not engine.restarts_itself
            else None
        )
        self._auto = AutoDepth(auto_rules or AutoRules())
        self._tasks: list[asyncio.Task[None]] = []
        engine.on_restart = self._count_restart
        metrics.watch_engine(lambda: engine.is_alive, self._load, engine.can_run)

    # Life

    @property
    def state(self) -> State:
        return self._state

    async def state_after(self, seen: State) -> State:
        """Return the state as soon as it is not ``seen``; states that were brief are missed."""
        while self._state is seen:
            await self._state_changed.wait()
        return self._state

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the start is doing meanwhile, and record how long it took."""
        self._startup_phase = name
        started = time.monotonic()
        yield
        self._startup_seconds[name] = time.monotonic() - started
        self.metrics.set_startup(name, self._startup_seconds[name])

    def open(self, policy: DepthPolicy, calibrator: Calibrator) -> None:
        """Begin to serve; the engine has been started, and is watched from now on."""
        self._model = self._engine.model
        self._calibrator = calibrator
        self._install(policy)
        self.set_auto_rules(self._auto.rules)
        self._startup_phase = ""
        loop = asyncio.get_running_loop()
        self.metrics.watch_tasks(lambda: len(asyncio.all_tasks(loop)))
        self._tasks.append(asyncio.create_task(self._supervisor.run()))
        self._tasks.append(asyncio.create_task(self._follow_load()))
        if self._watchdog is not None:
            self._tasks.append(asyncio.create_task(self._watchdog.run()))
        if self._state is State.STARTING:
            self._set_state(State.SERVING)

    async def drain(self, grace_seconds: float | None = None) -> int:
        """Refuse new requests and wait for those in flight; return how many are left.

        Waits at most ``grace_seconds``, by default those of the settings.
        """
        self._set_state(State.DRAINING)
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        try:
            await asyncio.wait_for(self._admission.idle(), grace)
        except TimeoutError:
            logger.warning("%d requests did not end in %g s", self._admission.num_in_flight, grace)
        return self._admission.num_in_flight

    async def close(self) -> None:
        """Stop watching the engine, whose shutdown is up to the caller."""
        self._set_state(State.DRAINING)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._prompts.close()

    def status(self) -> Status:
        return Status(
            state=self._state,
            startup_phase=self._startup_phase,
            startup_seconds=dict(self._startup_seconds),
            load=self._load(),
            uptime=time.monotonic() - self._created,
            num_engine_restarts=self._num_engine_restarts,
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
        self._require_serving()
        with self._admit(request.request_id) as admitted, self._engine_errors():
            prompt_ids = await self._prompt_ids(request.prompt)
            self._admission.count_tokens(admitted, len(prompt_ids))
            sampling = self._checked(request.sampling, len(prompt_ids))
            # What is wrong is told at once; what the server chooses, when the request starts.
            _, served = self.policy.resolve(request.depth, request.prefill_depth)
            self._auto.observe_arrival()
            async with self._turn(admitted, served, deadline) as turn:
                layers, served = self.policy.resolve(request.depth, request.prefill_depth)
                yield PromptInfo(admitted.request_id, len(prompt_ids), served)
                if request.echo:
                    yield GenerationDelta(self._prompts.text(request.prompt, prompt_ids), ())
                cost = _GENERATED_TOKEN_COST * served.decode_layers / self.policy.num_layers

                def on_tokens(num_tokens: int) -> None:
                    self._admission.begin(admitted)
                    turn.charge(cost * num_tokens)

                run = Run(
                    GenerationRequest(admitted.request_id, prompt_ids, layers, sampling),
                    served,
                    arrived,
                    self.metrics,
                    on_tokens=on_tokens,
                    on_latency=self._auto.observe,
                    on_end=turn.end,
                    max_unread=self._max_unread,
                )
                try:
                    async with aclosing(self._run(run, turn, resubmit=resubmit)) as events:
                        async for event in events:
                            yield event
                finally:
                    self.metrics.end(served.decode_layers, time.monotonic() - arrived)

    async def score(self, request: Scoring, *, deadline: float = math.inf) -> ScoringResult:
        """Return the log-probabilities of the tokens of the continuation; see :meth:`generate`."""
        self._require_serving()
        with self._admit(request.request_id) as admitted, self._engine_errors():
            context_ids: list[int] = []
            if request.context is not None:
                fields = "context_text", "context_ids.ids"
                context_ids = await self._prompts.read(request.context, *fields)
                if not context_ids:
                    raise InvalidArgument(
                        field_of(request.context, *fields), "", "at least one token"
                    )
            fields = "text", "token_ids.ids"
            field = field_of(request.continuation, *fields)
            ids = await self._prompts.read(
                request.continuation, *fields, special_tokens=request.context is None
            )
            if len(context_ids) + len(ids) < 2 or not ids:
                allowed = "at least one token to score, after at least one token of context"
                raise InvalidArgument(field, f"{len(ids)} tokens", allowed)
            self._prompts.check_length(len(context_ids) + len(ids), field)
            self._admission.count_tokens(admitted, len(context_ids) + len(ids))
            _, served = self.policy.resolve(request.depth, request.prefill_depth)
            async with self._turn(admitted, served, deadline) as turn:
                layers, served = self.policy.resolve(request.depth, request.prefill_depth)
                resubmit = True
                while True:
                    num_restarts = self._num_engine_restarts
                    try:
                        scores = await self._engine.score(
                            admitted.request_id, context_ids + ids, len(context_ids) or 1, layers
                        )
                        return ScoringResult(tuple(scores), served)
                    except EngineDead as error:
                        self._note_death(num_restarts)
                        if not resubmit:
                            raise Unavailable(_ENGINE_DEAD) from error
                    resubmit = False
                    await turn.again()

    async def tokenize(
        self, prompt: Prompt, *, special_tokens: bool = True
    ) -> tuple[list[int], list[str]]:
        """Return the ids and the texts of the prompt's tokens.

        It waits as other requests do, and counts as one of them.
        """
        self._require_started()
        with self._admit(""), self._engine_errors():
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
        self._require_serving()
        async with self._measurement() as calibrator:
            queue: asyncio.Queue[Progress | None] = asyncio.Queue()
            task = asyncio.create_task(
                self._calibrate(calibrator, texts, max_tokens, queue.put_nowait)
            )
            task.add_done_callback(lambda _: queue.put_nowait(None))
            try:
                while (progress := await queue.get()) is not None:
                    yield progress
                yield await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def set_levels(
        self, specs: Sequence[LevelSpec], default_level: str | None = None
    ) -> DepthPolicy:
        """Measure the levels that are new, then replace all levels at once.

        Engines that new levels need are started before, those that no level needs any more end
        with their last request. Raises :class:`InvalidArgument`, naming ``levels[i]``, and
        :class:`FailedPrecondition` while another measurement runs and where a level's engine
        cannot be started; nothing is replaced then.
        """
        self._require_serving()
        num_layers = self.policy.num_layers
        levels = check_levels(
            spec.resolve(num_layers, f"levels[{i}]") for i, spec in enumerate(specs)
        )
        self.policy.with_levels(levels, default_level)  # refuses a default that does not exist
        async with self._measurement() as calibrator:
            policy = self.policy.with_levels(levels, default_level)
            async with self._prepared(policy, lambda _: None):
                policy = await self._measured(calibrator, policy, lambda _: None)
                # What SetPolicy changed meanwhile stays.
                self._install(
                    self.policy.with_levels(levels, default_level).with_measurements(
                        policy.qualities, policy.speeds
                    )
                )
            await self._keep(self.policy)
            return self.policy

    # Inside

    async def _run(
        self, run: Run, turn: Turn, *, resubmit: bool
    ) -> AsyncGenerator[GenerationEvent, None]:
        while True:
            num_restarts = self._num_engine_restarts
            try:
                async with aclosing(run.events(self._engine)) as events:
                    async for event in events:
                        yield event
                return
            except EngineDead as error:
                self._note_death(num_restarts)
                if not resubmit or run.has_begun:
                    raise Unavailable(_ENGINE_DEAD) from error
            # Once: what has killed two engines may be this request.
            resubmit = False
            await turn.again()

    def _admit(self, request_id: str) -> AbstractContextManager[Admitted]:
        return self._admission.admit(request_id, current_caller().client)

    def _turn(self, admitted: Admitted, served: ServedDepth, deadline: float) -> Turn:
        return self._queue.turn(
            admitted.client,
            admitted.num_tokens,
            admitted.num_tokens * served.prefill_layers / self.policy.num_layers,
            deadline=deadline,
            on_refused=lambda: self._admission.begin(admitted),
        )

    async def _calibrate(
        self,
        calibrator: Calibrator,
        texts: Sequence[str],
        max_tokens: int | None,
        on_progress: Callable[[Progress], None],
    ) -> Plan:
        with self._engine_errors():
            plan = await calibrator.measure_plan(on_progress, texts, max_tokens)
        policy = self.policy.with_plan(plan)
        async with self._prepared(policy, on_progress):
            policy = await self._measured(calibrator, policy, on_progress)
            # What SetPolicy changed meanwhile stays.
            self._install(
                self.policy.with_plan(plan).with_measurements(policy.qualities, policy.speeds)
            )
        await self._keep(self.policy)
        return plan

    @asynccontextmanager
    async def _prepared(
        self, policy: DepthPolicy, on_progress: Callable[[Progress], None]
    ) -> AsyncIterator[None]:
        """Have the engine ready for ``policy``; afterwards, for the policy in force alone."""
        try:
            await self._engine.prepare(
                policy.plan,
                policy.level_selections(),
                lambda done, total: on_progress(Progress("levels", done, total)),
            )
            yield
        finally:
            self._engine.release_others(self.policy.level_selections().values())

    async def _measured(
        self,
        calibrator: Calibrator,
        policy: DepthPolicy,
        on_progress: Callable[[Progress], None],
    ) -> DepthPolicy:
        """Return the policy with the quality and speed of those of its depths that lack them."""
        with self._engine_errors():
            wanted = calibrator.depths_to_measure(policy)
            qualities = await calibrator.measure_quality(
                policy, [pair for pair in wanted if pair not in policy.qualities], on_progress
            )
            speeds = await calibrator.measure_speed(
                policy,
                [level.depths for level in policy.levels if level.depths not in policy.speeds],
                on_progress,
            )
        return policy.with_measurements(qualities, speeds)

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

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        num_restarts = self._num_engine_restarts
        try:
            yield
        except EngineDead as error:
            self._note_death(num_restarts)
            raise Unavailable(_ENGINE_DEAD) from error

    def _note_death(self, num_restarts: int) -> None:
        """Note that a request has found the engine dead that began after so many restarts."""
        # It may learn late of a death that has been dealt with.
        if num_restarts == self._num_engine_restarts:
            self._engine_died()
            self._supervisor.report_death()

    def _engine_died(self) -> bool:
        """Return whether the engine is to be started again."""
        if self._state is State.SERVING:
            self._set_state(State.ENGINE_DOWN)
        if self._state is State.ENGINE_DOWN:
            self._queue.pause()
            return True
        self._queue.fail(lambda: Unavailable("the engine has died, and the server is draining"))
        return False

    def _count_restart(self) -> None:
        self._num_engine_restarts += 1
        self.metrics.count_engine_restart()

    def _engine_restarted(self) -> None:
        if not self._engine.restarts_itself:  # else it has counted
            self._count_restart()
        if self._state is State.ENGINE_DOWN:
            self._set_state(State.SERVING)
        self._queue.resume()

    def _restart_failed(self) -> None:
        self._queue.fail(lambda: Unavailable("the engine has died, and could not be started again"))

    def _set_state(self, state: State) -> None:
        if state is not self._state:
            logger.info("%s", state.value)
            self._state = state
            self._state_changed.set()
            self._state_changed = asyncio.Event()

    def _require_started(self) -> None:
        if self._policy is None:
            raise Unavailable(f"the server is starting: {self._startup_phase}")

    def _require_serving(self) -> None:
        match self._state:
            case State.STARTING:
                raise Unavailable(f"the server is starting: {self._startup_phase}")
            case State.DRAINING:
                raise Unavailable("the server is draining and takes no more requests")
            case State.ENGINE_DOWN:
                raise Unavailable(_ENGINE_DEAD)

    def _load(self) -> LoadInfo:
        try:
            load = self._engine.load()
        except EngineDead:
            load = LoadInfo(0, 0)
        return LoadInfo(load.num_running, load.num_waiting + self._queue.num_waiting)

    def _install(self, policy: DepthPolicy) -> None:
        self._policy = policy
        self.metrics.set_policy(policy)

    async def _keep(self, policy: DepthPolicy) -> None:
        if self._save is not None:
            try:
                await asyncio.to_thread(self._save, policy)
            except OSError:
                logger.exception("the plan is in force, but could not be kept for the next start")

    @asynccontextmanager
    async def _measurement(self) -> AsyncIterator[Calibrator]:
        if self._calibrating.locked():
            raise FailedPrecondition("another Calibrate or SetLevels is running")
        assert self._calibrator is not None
        async with self._calibrating:
            yield self._calibrator

    async def _prompt_ids(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TextPrompt(""):
                raise InvalidArgument("prompt", "", "at least one token")
            case ChatPrompt(()):
                raise InvalidArgument("chat.messages", [], "at least one message")
        fields = "prompt", "token_ids.ids"
        ids = await self._prompts.read(prompt, *fields)
        if not ids:
            raise InvalidArgument(field_of(prompt, *fields), ids, "at least one token")
        return ids

    def _checked(self, sampling: SamplingOptions, num_prompt_tokens: int) -> SamplingOptions:
        """Return the options, with the limits that follow from the model."""
        vocab_size, room = self.model.vocab_size, self.model.max_context - num_prompt_tokens
        self._prompts.check_ids(sampling.stop_token_ids, "stop.stop_token_ids")
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if sampling.min_tokens is not None and sampling.min_tokens > max_tokens:
            allowed = f"at most {max_tokens}, the most that can be generated"
            raise InvalidArgument("stop.min_tokens", sampling.min_tokens, allowed)
        if sampling.logprobs is not None and sampling.logprobs > self._max_logprobs:
            raise InvalidArgument(
                "output.logprobs", sampling.logprobs, f"0 to {self._max_logprobs}"
            )
        top_k = None if sampling.top_k is None else min(sampling.top_k, vocab_size)
        return replace(sampling, max_tokens=max_tokens, top_k=top_k)
