"""The steps of a start: from settings that have been read to a service that is open."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from pruning.checkpoint import CheckpointError
from pruning.plan import Plan
from pruning.quantization import QuantizationError, plan_of_base
from pruning.repair import RepairError
from pruning.surgery import SurgeryError
from pruning.text import TextError
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.offline_plan import kept_plan
from server.calibration.policy_store import PolicyStore
from server.calibration.served_metrics import searches
from server.calibration.state_keys import policy_store, search_store
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.depth.levels import DepthPair
from server.depth.policy import DepthPolicy
from server.engine.base import Engine, EngineDead, RepairsLayers
from server.model.inputs import Inputs, refused_as
from server.model.quantized import QuantizedModel
from server.serving.service import Service
from server.telemetry.progress import ProgressReport

# Models with more layers have their quality measured at the levels alone.
_MAX_LAYERS_FOR_EVERY_DEPTH = 16

_WORK = {
    "importance": "Ranking the layers",
    "search": "Searching for the layers to leave out",
    "repair": "Fitting what stands in for skipped layers",
    "levels": "Starting the engines of the levels",
    "quality": "Measuring quality",
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

    async def run(self, before_open: Callable[[], Awaitable[None]] | None = None) -> None:
        """Take all steps, and open the service.

        ``before_open`` is called when all else has been done.

        Raises:
            StartError: one of the steps failed.
        """
        if self._inputs.quantized is not None:
            self._inputs = await self._quantize(self._inputs.quantized)
        await self._load_model()
        with refused_as("model"), refused_as("the engine has died while measuring", EngineDead):
            calibrator, store = self._calibrator(), self._policy_store()
            repair = await self._fitted_repair(calibrator, store)
            plan = await self._plan(calibrator, store, repair)
            policy = DepthPolicy(
                plan,
                self._inputs.levels,
                self._inputs.default_level,
                any_depth=self._engine.serves_any_depth,
            )
            if not policy.any_depth:
                with self._service.phase("levels"):
                    await calibrator.prepare(policy, self._on_progress)
            if repair is not None:
                policy = await self._repair(policy, repair, calibrator, store)
            policy = await self._measure(policy, calibrator, store)
        if before_open is not None:
            await before_open()
        self._service.open(policy, calibrator, store)
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

    async def _plan(self, calibrator: Calibrator, store: PolicyStore, repair: str | None) -> Plan:
        """Return the plan that the settings name, that is kept, or that is measured now."""
        with self._service.phase("plan"):
            plan = self._inputs.plan
            if plan is None and not self._engine.serves_any_depth:
                # Such an engine loads a model only to rank its layers: any kept plan of the metric
                # will do.
                inputs, settings = self._inputs, self._settings
                plan = kept_plan(
                    settings, inputs.fingerprint, inputs.tokenizer, inputs.texts, settings.metric
                )
            return plan or await store.plan(
                lambda: calibrator.measure_plan(self._on_progress, repair=repair)
            )

    async def _fitted_repair(self, calibrator: Calibrator, store: PolicyStore) -> str | None:
        """Install repair maps in the engine, if they are wanted; return their fingerprint."""
        if self._settings.repair == "none":
            return None
        engine = self._engine
        assert isinstance(engine, RepairsLayers), "the settings have been checked"
        with self._service.phase("repair"), refused_as("repair", RepairError, OSError):
            path = await store.repair(
                lambda path: calibrator.fit_repair(engine, path, self._on_progress)
            )
            return await engine.install_repair(path)

    async def _repair(
        self, policy: DepthPolicy, repair: str, calibrator: Calibrator, store: PolicyStore
    ) -> DepthPolicy:
        """Return the policy with repair, where that brings its levels closer to the dense model."""
        repaired = policy.with_repair(repair)
        with self._service.phase("repair"):
            pruned = [level.depths for level in policy.levels if level.depths != policy.dense]
            losses = [await self._loss(of, pruned, calibrator, store) for of in (policy, repaired)]
        without, with_repair = losses
        if not pruned:
            return repaired
        if with_repair >= without:
            logger.warning(
                "repair is not used: the levels are %.3f nats from the dense model with it, "
                "%.3f without",
                with_repair,
                without,
            )
            if self._inputs.plan is None and searches(policy.plan.metric):
                logger.warning("the search for the layers to leave out has counted on repair")
            return policy
        logger.info(
            "repair: the levels are %.3f nats from the dense model, %.3f without it",
            with_repair,
            without,
        )
        return repaired

    async def _loss(
        self,
        policy: DepthPolicy,
        depths: Sequence[DepthPair],
        calibrator: Calibrator,
        store: PolicyStore,
    ) -> float:
        """Return the mean divergence from the dense model at ``depths``, in nats a token."""
        qualities = await store.qualities(
            policy,
            depths,
            lambda missing: calibrator.measure_quality(policy, missing, self._on_progress),
        )
        return math.fsum(
            math.inf if quality.kl_nats is None else quality.kl_nats
            for quality in qualities.values()
        ) / max(len(qualities), 1)

    async def _measure(
        self, policy: DepthPolicy, calibrator: Calibrator, store: PolicyStore
    ) -> DepthPolicy:
        """Return the policy with its qualities and speeds; those that are not kept are measured."""
        with self._service.phase("quality"):
            qualities = await store.qualities(
                policy,
                calibrator.depths_to_measure(policy),
                lambda missing: calibrator.measure_quality(policy, missing, self._on_progress),
            )
        with self._service.phase("speed"):
            speeds = await store.speeds(
                policy,
                calibrator.depths_to_time(policy),
                lambda missing: calibrator.measure_speed(policy, missing, self._on_progress),
            )
        return policy.with_measurements(qualities, speeds)

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
            texts=inputs.texts,
            max_tokens=settings.calibration_tokens,
            held_out_texts=inputs.held_out_texts,
            max_held_out_tokens=settings.quality_tokens,
            every_depth=every_depth,
            metric=settings.metric,
            search_tokens=settings.search_tokens,
            search_store=search_store(
                settings,
                self._engine.model,
                fingerprint=inputs.fingerprint,
                tokenizer=inputs.tokenizer,
            ),
        )

    def _policy_store(self) -> PolicyStore:
        inputs = self._inputs
        return policy_store(
            self._settings,
            self._engine.model,
            fingerprint=inputs.fingerprint,
            tokenizer=inputs.tokenizer,
            num_layers=inputs.num_layers,
            texts=inputs.texts,
            held_out_texts=inputs.held_out_texts,
        )

    def _on_progress(self, progress: Progress) -> None:
        self._progress.advance(_WORK[progress.phase], progress.done, progress.total)
