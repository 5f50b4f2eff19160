"""The service of a model: its state, the model, and the policy that it is served under."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from server.background import BackgroundTask
from server.calibration.calibrator import Calibrator
from server.calibration.late_measurements import LateMeasurements
from server.calibration.measuring_steps import MeasuringSteps
from server.calibration.policy_in_force import PolicyInForce
from server.calibration.policy_store import PolicyStore
from server.calibration.policy_updates import PolicyUpdates
from server.calibration.repair_renewal import RepairRenewal
from server.calibration.repairer import Repairer
from server.depth.auto_rules import AutoRules, check_rules, ladder
from server.depth.autodepth import AutoDepth
from server.depth.depth_choice import RequestKind
from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus
from server.engine.base import Engine, EngineDead, LoadInfo, ModelInfo
from server.serving.admission import Admission
from server.serving.engine_restarter import EngineRestarter
from server.serving.fair_queue import FairQueue
from server.serving.inference import Inference
from server.serving.load_follower import LoadFollower
from server.serving.prompts import PromptReader
from server.serving.result_check import ResultCheck
from server.serving.service_state import ServiceState, State, Status
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class Service:
    """Serves one model at any depth; requests go to ``inference``.

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
        max_buffered_tokens: int | None = None,
        share_prefix_cache: bool = False,
        grace_seconds: float = 30.0,
        engine_timeout_seconds: float = 0.0,
        engine_stall_seconds: float = 0.0,
        auto_rules: AutoRules | None = None,
        max_logprobs: int = 20,
        version: str = "",
        checks_results: bool = False,
        poll_seconds: float = 1.0,
        first_restart_delay: float = 0.5,
        max_restart_delay: float = 30.0,
    ) -> None:
        """Serve with ``engine``, once it has been started.

        ``max_running`` requests are given to an engine at a time; None: all. A dedicated engine
        has one engine for each depth among the levels. A client may leave
        ``max_buffered_tokens`` of a stream unread, in tokens and log-probabilities.
        ``share_prefix_cache``: clients trust each other, and share what is cached. An engine that
        does not answer for ``engine_timeout_seconds`` is started again, and one that does nothing
        at all after ``engine_stall_seconds``; 0: never. ``max_logprobs`` is the engine's limit.
        ``checks_results``: the levels are checked for results that are not finite when the
        service opens, and when the engine was restarted.
        """
        self.metrics = metrics
        self._engine = engine
        self._max_running = max_running
        self._queue = FairQueue(max_running)
        self._prompts = PromptReader(engine)
        self._admission = Admission(
            self._queue, max_waiting, max_waiting_tokens, other_queues=self._prompts.queues
        )
        self._grace_seconds = grace_seconds
        self._version = version
        self._state = ServiceState(metrics)
        self._model: ModelInfo | None = None
        self._in_force = PolicyInForce(metrics, self._follow_policy)
        self._results = ResultCheck(engine, self._state, metrics)
        self._updates: PolicyUpdates | None = None
        self._repair = RepairRenewal(
            engine, self._in_force, is_busy=lambda: self._has_requests or not self._serves
        )
        self._late: LateMeasurements | None = None
        self._restarter = EngineRestarter(
            engine,
            self._state,
            self._queue,
            metrics,
            timeout_seconds=engine_timeout_seconds,
            stall_seconds=engine_stall_seconds,
            poll_seconds=poll_seconds,
            first_delay=first_restart_delay,
            max_delay=max_restart_delay,
            on_restarted=self._engine_restarted,
        )
        self._auto = AutoDepth(auto_rules or AutoRules())
        self.inference = Inference(
            engine,
            self._state,
            self._in_force,
            self._admission,
            self._prompts,
            self._queue,
            self._restarter,
            self._results,
            self._auto,
            metrics,
            max_buffered_tokens=max_buffered_tokens,
            share_prefix_cache=share_prefix_cache,
            max_logprobs=max_logprobs,
        )
        follower = LoadFollower(self._auto, self._queue, self._in_force, metrics)
        self._tasks = [
            BackgroundTask("automatic depth", follower.run),
            *self._restarter.tasks(),
            self._repair.task(),
        ]
        if checks_results:
            self._tasks.append(self._results.task())
        metrics.watch_engine(lambda: engine.is_alive, self._load, engine.can_run)

    # State

    @property
    def state(self) -> State:
        return self._state.state

    async def state_after(self, seen: State) -> State:
        """Return the state as soon as it is not ``seen``; states that were brief are missed."""
        return await self._state.state_after(seen)

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served, and the default depth gives results."""
        return self._state.is_healthy

    async def health_after(self, seen: bool) -> bool:
        """Return :attr:`is_healthy` as soon as it is not ``seen``."""
        return await self._state.health_after(seen)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name what the start is doing meanwhile, and record how long it took."""
        return self._state.phase(name)

    def open(
        self,
        policy: DepthPolicy,
        calibrator: Calibrator,
        store: PolicyStore | None = None,
        *,
        repair: RepairStatus | None = None,
        repairer: Repairer | None = None,
        fits_repair: bool = False,
        measures_on: bool = False,
    ) -> None:
        """Begin to serve; the engine has been started, and is watched from now on.

        ``store`` keeps what is measured while serving for the next start. ``repair`` is what has
        come of the repair that the settings ask for; ``repairer`` fits it again where the engine
        has lost it. ``fits_repair``: it is to be fitted now, in the gaps of load. ``measures_on``:
        so is what ``policy`` lacks measured.
        """
        self._model = self._engine.model
        self._updates = PolicyUpdates(self._engine, calibrator, self._in_force, store)
        self._repair.open(self._updates, store, repairer, fits_now=fits_repair)
        self._in_force.install(policy)
        self._in_force.set_repair(repair or RepairStatus())
        self._state.startup_phase = ""
        self.set_auto_rules(self._auto.rules)
        loop = asyncio.get_running_loop()
        self.metrics.watch_tasks(lambda: len(asyncio.all_tasks(loop)))
        if measures_on or fits_repair:
            self._late = LateMeasurements(
                MeasuringSteps(calibrator, store, lambda _: None),
                self._in_force,
                is_busy=lambda: self._is_busy,
                awaits_repair=lambda: self._repair.is_pending,
                errors=self._restarter.errors,
            )
            self._tasks.append(BackgroundTask("what is measured while serving", self._late.run))
        for task in self._tasks:
            task.start()
        if self.state is State.STARTING:
            self._state.turn_to(State.SERVING)

    async def drain(self, grace_seconds: float | None = None, *, for_good: bool = False) -> int:
        """Refuse new requests and wait for those in flight; return how many are left.

        Waits at most ``grace_seconds``, by default those of the settings, and no longer than
        until :meth:`resume`, which ``for_good`` rules out.
        """
        self._state.drain(for_good=for_good)
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        waits = [
            asyncio.create_task(wait)
            for wait in (self._admission.idle(), self._state.state_after(State.DRAINING))
        ]
        try:
            await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        if self.state is State.DRAINING and self._admission.num_in_flight:
            logger.warning("%d requests did not end in %g s", self._admission.num_in_flight, grace)
        return self._admission.num_in_flight

    def resume(self) -> State:
        """Take requests again after :meth:`drain`; return the state.

        Raises :class:`FailedPrecondition` where the server is not draining, or is being stopped.
        """
        self._state.require_draining()
        if not self._in_force.is_known:
            self._state.turn_to(State.STARTING)
        else:
            self._restarter.resume()
        return self.state

    async def close(self) -> None:
        """Stop watching the engine, whose shutdown is up to the caller."""
        self._state.drain(for_good=True)
        for task in self._tasks:
            await task.stop()
        self._prompts.close()

    def status(self) -> Status:
        policy = self._in_force.policy if self._in_force.is_known else None
        return Status(
            state=self.state,
            startup_phase=self._state.startup_phase,
            startup_seconds=dict(self._state.startup_seconds),
            load=self._load(),
            uptime=self._state.uptime,
            num_engine_restarts=self._restarter.num_restarts,
            version=self._version,
            auto_level="" if policy is None else policy.present_level,
            auto_score_level="" if policy is None else policy.present_score_level,
            problems=self._state.problems,
            repair=self._in_force.repair,
            level_problems=(*self._in_force.problems, *(self._late.problems if self._late else ())),
            unmeasured=tuple(self._late.pending if self._late else ()),
        )

    # Model and policy

    @property
    def model(self) -> ModelInfo:
        """The model that is served; raises :class:`Unavailable` until it is known."""
        self._state.require_started()
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
    def is_open(self) -> bool:
        """Whether there is a policy in force, as there is from :meth:`open` on."""
        return self._in_force.is_known

    @property
    def policy(self) -> DepthPolicy:
        """The policy in force; raises :class:`Unavailable` until there is one."""
        self._state.require_started()
        return self._in_force.policy

    @property
    def repair(self) -> RepairStatus:
        """What stands in for skipped layers, and what has become of what the settings ask for."""
        return self._in_force.repair

    @contextmanager
    def updating(self) -> Iterator[PolicyUpdates]:
        """Yield what measures another policy and puts it in force.

        Raises :class:`Unavailable` in any state but SERVING, and where the engine dies meanwhile.
        """
        self._state.require_serving()
        assert self._updates is not None
        with self._restarter.errors():
            yield self._updates

    @property
    def is_measuring(self) -> bool:
        """Whether another policy is being measured."""
        return self._updates is not None and self._updates.is_running

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
        self._in_force.install(policy)
        generate, score = (
            ", ".join(each.name for each in ladder(policy, rules, kind))
            for kind in (RequestKind.GENERATE, RequestKind.SCORE)
        )
        logger.info("levels of automatic depth: %s for Generate, %s for Score", generate, score)

    # Inside

    @property
    def _is_busy(self) -> bool:
        """Whether requests are in flight, or no measurement can be made besides."""
        return not self._serves or self.is_measuring or self._has_requests

    @property
    def _serves(self) -> bool:
        return self.state is State.SERVING

    @property
    def _has_requests(self) -> bool:
        return self._admission.num_in_flight > 0

    def _load(self) -> LoadInfo:
        try:
            load = self._engine.load()
        except EngineDead:
            load = LoadInfo(0, 0)
        return LoadInfo(load.num_running, load.num_waiting + self._queue.num_waiting)

    def _engine_restarted(self) -> None:
        if self._in_force.is_known:
            self._repair.engine_restarted()  # so that no level that is checked names lost maps
        self._results.engine_restarted()

    def _follow_policy(self, policy: DepthPolicy) -> None:
        """Check the policy's levels; give the queue as many slots as its engines run requests."""
        selections = policy.level_selections()
        self._results.follow(selections.values(), selections[policy.default_level])
        if self._max_running is not None:
            num_engines = 1 if policy.any_depth else len({*selections.values()})
            self._queue.set_num_slots(self._max_running * num_engines)
