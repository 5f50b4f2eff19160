"""The steps of a start: from settings that have been read to a service that is open."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pruning.checkpoint import CheckpointError
from pruning.fingerprint import text_fingerprint, token_fingerprint
from pruning.plan import Plan
from pruning.quantization import QuantizationError, plan_of_base
from pruning.repair import RepairError
from pruning.repair.healing_job import HealingJob
from pruning.surgery import SurgeryError
from pruning.text import TextError
from pruning.transformers_model import load_tokenizer
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.healed_store import HealedStore, Training
from server.calibration.healing import HealedLevels
from server.calibration.measuring_steps import MeasuringSteps
from server.calibration.offline_plan import kept_plan
from server.calibration.own_text import OwnText
from server.calibration.own_text_store import LENGTH, SEED
from server.calibration.policy_store import PolicyStore
from server.calibration.repairer import InstalledRepair, Repairer
from server.calibration.served_metrics import AUTO, searches
from server.calibration.state_keys import policy_store, search_store
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.depth.level_search import compared_depths, with_found_levels
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.depth.repair import Repair, RepairStatus, StandIn
from server.engine.base import Engine, EngineDead, RepairsLayers
from server.model.inputs import Inputs, own_text_store, refused_as
from server.model.quantized import QuantizedModel
from server.serving.level_healer import LevelHealer
from server.serving.service import Service
from server.telemetry.progress import ProgressReport

# Models with more layers have their quality measured at the levels alone.
_MAX_LAYERS_FOR_EVERY_DEPTH = 16

_WORK = {
    "importance": "Ranking the layers",
    "search": "Searching for the layers to leave out",
    "orders": "Comparing what to leave out first",
    "repair": "Fitting what stands in for skipped layers",
    "levels": "Starting the engines of the levels",
    "quality": "Measuring quality",
    "probes": "Probing writing and choosing",
    "speed": "Measuring speed",
}

logger = logging.getLogger(__name__)


class Startup:
    """Loads the model, and gets its plan and measurements from the state directory or anew."""

    def __init__(
        self,
        settings: Settings,
        inputs: Inputs,
        engine: Engine,
        service: Service,
        progress: ProgressReport,
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._engine = engine
        self._service = service
        self._progress = progress
        # Heals the levels while the server serves; None until the service is open, and where the
        # settings do not ask for it.
        self.healer: LevelHealer | None = None

    async def run(self, before_open: Callable[[], Awaitable[None]] | None = None) -> None:
        """Take all steps, and open the service.

        ``before_open`` is called when all else has been done.

        Raises:
            StartError: one of the steps failed.
        """
        if self._inputs.quantized is not None:
            self._inputs = await self._quantize(self._inputs.quantized)
        await self._load_model()
        if self._inputs.texts is None:
            self._inputs = replace(self._inputs, texts=await self._own_texts())
        with refused_as("model"), refused_as("the engine has died while measuring", EngineDead):
            calibrator, store = self._calibrator(), self._policy_store()
            specs = self._inputs.levels
            calibrator.check_limits(specs, (f"levels.{spec.name}" for spec in specs))
            repairer = self._repairer(calibrator, store)
            installed, problem = await self._installed_repair(repairer)
            repair = None if installed is None else installed.repair
            plan = await self._plan(calibrator, store, repair)
            policy = self._policy(plan)
            if not policy.any_depth:
                with self._service.phase("levels"):
                    await calibrator.prepare(policy, self._on_progress)
            status = RepairStatus()
            if repairer is not None and repair is None:
                status = RepairStatus(repairer.wanted, problem=problem)
            elif repairer is not None and repair is not None:
                policy, status = await self._repair(policy, repairer, repair)
            steps = MeasuringSteps(calibrator, store, self._on_progress)
            started = time.monotonic()
            policy = await self._measure(policy, store, steps, started)
            healed = self._healed_levels(calibrator, store)
            if healed is not None:
                with self._service.phase("repair"):
                    policy = await healed.with_kept(policy, self._on_progress)
                policy = await self._measure(with_found_levels(policy), store, steps, started)
        if before_open is not None:
            await before_open()
        self._service.open(
            policy,
            calibrator,
            store,
            repair=status,
            repairer=repairer,
            fits_repair=repairer is not None and installed is None and not problem,
            measures_on=steps.next(policy) is not None,
        )
        if healed is not None and installed is not None and self._settings.heal:
            self.healer = await self._healer(healed, calibrator, installed)
        # An operator who has set others with SetLevels may look for them here.
        logger.info(
            "levels, as the settings have them: %s; the default is %s",
            ", ".join(map(str, policy.levels)),
            policy.default_level,
        )
        for phase, seconds in self._service.status().startup_seconds.items():
            logger.info("start: %s took %.1f s", phase, seconds)

    async def _quantize(self, model: QuantizedModel) -> Inputs:
        """Quantize the model, unless it is kept; return the inputs with the quantized model."""
        errors = (QuantizationError, SurgeryError, CheckpointError, TextError, OSError)
        with self._service.phase("quantize"), refused_as("quantize", *errors):
            fingerprint = await model.prepare(
                lambda *layers: self._progress.advance("Quantizing the layers", *layers)
            )
        plan = self._inputs.plan and plan_of_base(self._inputs.plan, model.directory, fingerprint)
        return replace(self._inputs, fingerprint=fingerprint, plan=plan)

    async def _load_model(self) -> None:
        with (
            self._progress.working("Loading the model"),
            self._service.phase("engine"),
            refused_as("engine", Exception),  # vLLM documents no base class of what it raises
        ):
            await self._engine.start()

    async def _own_texts(self) -> Sequence[str]:
        """Return text that the model has written, or writes now, to rank its layers on."""
        settings, inputs = self._settings, self._inputs

        async def write() -> list[str]:
            directory = inputs.source.directory
            tokenizer = load_tokenizer(directory, trust=settings.trust_remote_code)
            return await OwnText(self._engine, tokenizer).documents(
                settings.calibration_tokens,
                LENGTH,
                SEED,
                lambda *tokens: self._progress.advance(
                    "Writing text to rank the layers on", *tokens
                ),
            )

        store = own_text_store(settings, inputs.fingerprint, inputs.tokenizer)
        with self._service.phase("text"), refused_as("calibration", CheckpointError, EngineDead):
            return await store.kept_or_written(write)

    async def _plan(
        self, calibrator: Calibrator, store: PolicyStore, repair: Repair | None
    ) -> Plan:
        """Return the plan that the settings name, that is kept, or that is measured now."""
        with self._service.phase("plan"):
            plan = self._inputs.plan
            if plan is None and not self._engine.serves_any_depth:
                # Such an engine loads a model only to rank its layers: any kept plan of the metric
                # will do.
                inputs, settings = self._inputs, self._settings
                metric = None if settings.metric == AUTO else settings.metric
                plan = kept_plan(
                    settings, inputs.fingerprint, inputs.tokenizer, self._texts, metric
                )
            fingerprint = None if repair is None else repair.fingerprint
            return plan or await store.plan(
                lambda: calibrator.measure_plan(
                    self._on_progress,
                    repair=fingerprint,
                    depths=compared_depths(self._inputs.levels, self._inputs.num_layers),
                )
            )

    async def _installed_repair(
        self, repairer: Repairer | None
    ) -> tuple[InstalledRepair | None, str]:
        """Install repair maps in the engine, if they are wanted; return what prevents it.

        There may be none yet, if they are to be fitted while the server serves.
        """
        if repairer is None:
            return None, ""
        with self._service.phase("repair"):
            if self._settings.repair != "auto":
                with refused_as("repair", RepairError, OSError):
                    return await repairer.install(), ""
            try:
                if self._fits_repair_now:
                    return await repairer.install(), ""
                return await repairer.install_kept(), ""
            except (RepairError, OSError) as error:
                problem = f"repair is not used: {error}"
                logger.error("%s", problem)
                return None, problem

    @property
    def _fits_repair_now(self) -> bool:
        """Whether a start waits for maps that are not there yet.

        It does where nothing is to be left for later, and where a search counts on them.
        """
        settings = self._settings
        return math.isinf(settings.startup_seconds) or (
            self._inputs.plan is None and searches(settings.metric)
        )

    async def _repair(
        self, policy: DepthPolicy, repairer: Repairer, repair: Repair
    ) -> tuple[DepthPolicy, RepairStatus]:
        """Return the policy with repair, where that brings its levels closer to the dense model."""
        with self._service.phase("repair"):
            policy, status = await repairer.judged(policy, repair)
        if status.problem and self._inputs.plan is None and searches(policy.plan.metric):
            logger.warning("the search for the layers to leave out has counted on repair")
        return policy, status

    @property
    def _texts(self) -> Sequence[str]:
        """The texts to rank the layers on, once there are some."""
        assert self._inputs.texts is not None
        return self._inputs.texts

    def _healed_levels(self, calibrator: Calibrator, store: PolicyStore) -> HealedLevels | None:
        if self._settings.repair != "healed":
            return None
        engine = self._engine
        assert isinstance(engine, RepairsLayers), "the settings have been checked"
        return HealedLevels(engine, calibrator, store, self._healed_store())

    def _healed_store(self) -> HealedStore:
        inputs = self._inputs
        return HealedStore(self._settings.state_dir, inputs.fingerprint, inputs.num_layers)

    async def _healer(
        self, levels: HealedLevels, calibrator: Calibrator, closed_form: InstalledRepair
    ) -> LevelHealer:
        settings, inputs, dtype = self._settings, self._inputs, self._engine.model.dtype
        windows = await calibrator.training_windows()
        training = Training(
            tokens=token_fingerprint(windows),
            held_out=token_fingerprint(calibrator.held_out_windows),
            started_from=closed_form.repair.fingerprint,
            dtype=dtype,
            steps=settings.heal_steps,
            seed=settings.heal_seed,
            kind=settings.heal_kind,
            intermediate_size=settings.heal_intermediate_size,
        )

        def job_of(skipped: tuple[int, ...], out: Path, checkpoint: Path) -> HealingJob:
            return HealingJob(
                model=str(inputs.source.directory),
                dtype=dtype,
                trust_remote_code=settings.trust_remote_code,
                model_fingerprint=inputs.fingerprint,
                text_fingerprint=text_fingerprint(self._texts),
                skipped=skipped,
                closed_form=str(closed_form.path),
                windows=windows,
                held_out=(),  # the engine judges
                steps=settings.heal_steps,
                seed=settings.heal_seed,
                out=str(out),
                checkpoint=str(checkpoint),
                kind=settings.heal_kind,
                intermediate_size=settings.heal_intermediate_size,
            )

        return LevelHealer(self._service, levels, self._healed_store(), training, job_of)

    def _policy(self, plan: Plan) -> DepthPolicy:
        """Return the policy of the settings; levels are searched for once it has been measured."""
        num_layers, specs = self._inputs.num_layers, self._inputs.levels
        policy = DepthPolicy(
            plan,
            tuple(spec.resolve(num_layers) for spec in specs),
            self._inputs.default_level,
            any_depth=self._engine.serves_any_depth,
            specs=specs,
        )
        return with_found_levels(policy)

    async def _measure(
        self, policy: DepthPolicy, store: PolicyStore, steps: MeasuringSteps, started: float
    ) -> DepthPolicy:
        """Return the policy with what is kept of its measurements and what is measured now.

        That is what levels need, as far as there is time for it since ``started``, or with time
        without end everything; the service measures the rest.
        """
        seconds = self._settings.startup_seconds
        pairs = {level.depths for level in policy.levels}
        for depth in range(1, policy.num_layers + 1):
            pairs |= {DepthPair(depth, depth), DepthPair(depth, policy.num_layers)}
        possible = sorted(filter(policy.can_have, pairs))
        with self._service.phase("quality"):
            policy = with_found_levels(policy.with_measured(store.kept(policy, possible)))
        for phase in ("speed", "probes"):
            with self._service.phase(phase):
                pass  # A start that finds all of it kept shows these phases as well.
        while (step := steps.next(policy)) is not None:
            if (math.isfinite(seconds) and step.can_wait) or time.monotonic() - started >= seconds:
                break
            with self._service.phase(step.phase):
                policy = await steps.take(policy, step)
        return policy

    def _calibrator(self) -> Calibrator:
        settings, inputs = self._settings, self._inputs
        every_depth = settings.quality_depths == "all" or (
            settings.quality_depths is None and inputs.num_layers <= _MAX_LAYERS_FOR_EVERY_DEPTH
        )
        return Calibrator(
            self._engine,
            model_fingerprint=inputs.fingerprint,
            tokenizer_fingerprint=inputs.tokenizer,
            versions=measuring_versions(),
            texts=self._texts,
            max_tokens=settings.calibration_tokens,
            held_out_texts=inputs.held_out_texts,
            max_held_out_tokens=settings.quality_tokens,
            every_depth=every_depth,
            metric=settings.metric,
            search_tokens=settings.search_tokens,
            until_settled=settings.calibration_until_settled,
            search_store=search_store(
                settings,
                self._engine.model,
                fingerprint=inputs.fingerprint,
                tokenizer=inputs.tokenizer,
            ),
        )

    def _repairer(self, calibrator: Calibrator, store: PolicyStore) -> Repairer | None:
        """Return what repairs skipped layers, if the settings ask for it."""
        engine, repair = self._engine, self._settings.repair
        if repair == "none" or (repair == "auto" and not isinstance(engine, RepairsLayers)):
            return None
        assert isinstance(engine, RepairsLayers), "the settings have been checked"
        wanted = StandIn.CLOSED_FORM if repair == "auto" else StandIn(repair)
        return Repairer(engine, calibrator, store, self._on_progress, wanted=wanted)

    def _policy_store(self) -> PolicyStore:
        inputs = self._inputs
        return policy_store(
            self._settings,
            self._engine.model,
            fingerprint=inputs.fingerprint,
            tokenizer=inputs.tokenizer,
            num_layers=inputs.num_layers,
            texts=self._texts,
            held_out_texts=inputs.held_out_texts,
        )

    def _on_progress(self, progress: Progress) -> None:
        self._progress.advance(_WORK[progress.phase], progress.done, progress.total)
