"""Healing without a server, on a model that transformers has loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pruning.checkpoint import CheckpointError
from pruning.depths import check_depth
from pruning.fingerprint import (
    model_fingerprint,
    text_fingerprint,
    token_fingerprint,
    tokenizer_fingerprint,
)
from pruning.plan import Plan, PlanError
from pruning.quality import QualityError
from pruning.repair import (
    HealingStep,
    RepairError,
    fit_repair,
    layers_at_a_time,
    load_maps,
    maps_fingerprint,
    save_maps,
)
from pruning.repair.healing_job import HealingJob, HealingReport, run_job
from pruning.surgery import SurgeryError, count_layers
from pruning.text import TextError
from server.calibration.healed_store import HealedStore, Outcome, Training
from server.calibration.healing import what_is_not_better
from server.calibration.offline_plan import (
    context_of,
    kept_plan,
    load_offline,
    measured_plan,
    measuring_windows,
)
from server.calibration.served_metrics import searches
from server.calibration.text_windows import WINDOW
from server.config import Settings
from server.depth.policy import healable_layers
from server.file_hashes import FileHashes
from server.model.inputs import (
    StartError,
    calibration_texts,
    check_healable,
    chosen_levels,
    held_out_texts,
    refused_as,
)
from server.model.source import find_model
from server.state import DIRECTORY_MODE, StateDirectory
from server.state_keys import transformers_repair_key
from server.telemetry.progress import ProgressReport

_REPAIR_KIND = "repair"

logger = logging.getLogger(__name__)


class OfflineHealing:
    """Trains maps or gated MLPs for depths of a model, and keeps those that are better.

    The settings say of which model, and what is trained.

    Everything raises :class:`StartError`, which names the setting, for what cannot be healed.
    """

    def __init__(self, settings: Settings, progress: ProgressReport) -> None:
        self._settings = settings
        self._progress = progress
        with refused_as("model", CheckpointError, SurgeryError):
            if settings.quantize is not None:
                raise StartError("quantize: healing needs the model before it is quantized")
            source = find_model(settings.model, settings.revision)
            self._directory = source.directory
            check_healable(self._directory)
            self._fingerprint = model_fingerprint(self._directory, FileHashes(settings.state_dir))
            self.num_layers = count_layers(self._directory)
        with refused_as("calibration", TextError):
            self._texts = calibration_texts(settings, self._directory)
        with refused_as("quality_text", TextError):
            self._held_out_texts = held_out_texts(settings)
        self._store = HealedStore(settings.state_dir, self._fingerprint, self.num_layers)
        self._plan: Plan | None = None
        self._loaded: _Loaded | None = None

    def skipped_layers(self, depths: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the layers that each of ``depths`` skips, or those that each level does."""
        plan = self._plan = self._plan or self._found_plan()
        for depth in depths:
            try:
                check_depth(self.num_layers, depth)
            except ValueError as error:
                raise StartError(str(error)) from None
            if depth == self.num_layers:
                raise StartError(
                    f"depth: got {depth}, allowed: 1 to {self.num_layers - 1}; where no layer is "
                    "skipped, there is nothing to heal"
                )
        pairs = [(depth, depth) for depth in depths]
        if not depths:
            with refused_as("levels"):
                levels, _ = chosen_levels(self._settings, self.num_layers)
            if any(spec.is_searched for spec in levels):
                raise StartError(
                    "depth: none is given, and the levels are chosen by their quality, which a "
                    "server measures; allowed: --depth, with a depth that `fathom model` shows"
                )
            given = [spec.resolve(self.num_layers) for spec in levels]
            pairs = [(level.prefill_layers, level.decode_layers) for level in given]
        found = [
            healable_layers(*(tuple(sorted(plan.skipped(depth))) for depth in pair))
            for pair in pairs
        ]
        skipped = list(dict.fromkeys(layers for layers in found if layers is not None))
        if not skipped:
            raise StartError(
                "levels: none skips layers that one set of maps can stand in for; allowed: a level "
                "of fewer layers, the same for prompt and generated tokens or all for one of them"
            )
        return skipped

    def path_of(self, skipped: Sequence[int]) -> Path:
        """Return where the result is kept."""
        return self._store.path_of(skipped, self._settings.heal_kind)

    def done_before(self, skipped: Sequence[int]) -> Outcome | None:
        """Return what the same training came to before; None: it is to be done."""
        return self._store.outcome(skipped, self._model().training)

    def heal(
        self, skipped: Sequence[int], on_step: Callable[[HealingStep], None]
    ) -> tuple[HealingReport, str]:
        """Train, and keep the result if it is better; return what is not better."""
        settings, loaded = self._settings, self._model()
        candidate = self._store.candidate_of(skipped, loaded.training)
        job = HealingJob(
            model=str(self._directory),
            dtype=loaded.training.dtype,
            trust_remote_code=settings.trust_remote_code,
            model_fingerprint=self._fingerprint,
            text_fingerprint=text_fingerprint(self._texts),
            skipped=skipped,
            closed_form=str(loaded.closed_form),
            windows=loaded.windows,
            held_out=loaded.held_out,
            steps=settings.heal_steps,
            seed=settings.heal_seed,
            out=str(candidate),
            checkpoint=str(self._store.checkpoint_of(skipped, loaded.training)),
            kind=settings.heal_kind,
            intermediate_size=settings.heal_intermediate_size,
        )
        with refused_as("heal", RepairError, QualityError):
            report = run_job(job, loaded.model, on_step)
        assert report is not None, "there is held-out text"
        problem = what_is_not_better(report.before, report.healed)
        if not problem:
            self._store.keep(skipped, candidate)
        candidate.unlink()
        self._store.save_outcome(skipped, loaded.training, Outcome(problem))
        return report, problem

    def _found_plan(self) -> Plan:
        """Return the plan that the settings name, that is kept, or that is measured now."""
        settings = self._settings
        if settings.plan is not None:
            with refused_as("plan", PlanError, OSError):
                plan = Plan.load(settings.plan)
            with refused_as(f"plan: {settings.plan}", PlanError):
                plan.check_model(self._fingerprint, self.num_layers)
            return plan
        with refused_as("model", CheckpointError):
            tokenizer = tokenizer_fingerprint(self._directory)
        kept = kept_plan(settings, self._fingerprint, tokenizer, self._texts, settings.metric)
        if kept is not None:
            return kept
        if searches(settings.metric):
            raise StartError(
                f"metric: got {settings.metric!r}, but {settings.state_dir} has no plan by it for "
                "this model and text: a server makes one, or --plan names one"
            )
        with refused_as("the layers cannot be ranked; --plan takes a ranking", Exception):
            return measured_plan(
                settings,
                self._directory,
                self._fingerprint,
                self.num_layers,
                self._texts,
                self._progress,
                settings.metric,
            )

    def _model(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> _Loaded:
        settings = self._settings
        with (
            self._progress.working("Loading the model, to heal it"),
            refused_as("the model cannot be loaded", Exception),  # transformers has no base class
        ):
            model, tokenizer = load_offline(settings, self._directory)
        max_context = context_of(model)
        max_context = min(max_context, settings.max_context or max_context)

        def windows(texts: Sequence[str], max_tokens: int) -> list[list[int]]:
            return measuring_windows(model, tokenizer, texts, max_tokens, max_context)

        with refused_as("calibration", TextError):
            trained_on = windows(self._texts, settings.calibration_tokens)
        with refused_as("quality_text", TextError):
            held_out = windows(self._held_out_texts, settings.quality_tokens)
        if len(held_out) < 2:
            raise StartError(
                f"quality_text: got {sum(map(len, held_out))} tokens in one window, allowed: more "
                f"than {WINDOW} tokens, or two texts"
            )
        dtype = str(model.dtype).removeprefix("torch.")
        closed_form = self._closed_form(model, trained_on, dtype, max_context)
        training = Training(
            tokens=token_fingerprint(trained_on),
            held_out=token_fingerprint(held_out),
            started_from=maps_fingerprint(closed_form),
            dtype=dtype,
            steps=settings.heal_steps,
            seed=settings.heal_seed,
            kind=settings.heal_kind,
            intermediate_size=settings.heal_intermediate_size,
        )
        return _Loaded(model, trained_on, held_out, closed_form, training)

    def _closed_form(
        self, model: Any, windows: Sequence[Sequence[int]], dtype: str, max_context: int
    ) -> Path:
        """Return the file of the closed-form maps: kept by a server, or fitted now."""
        settings = self._settings
        text = text_fingerprint(self._texts)
        kept: list[tuple[float, Path]] = []
        for path in settings.state_dir.glob(f"{_REPAIR_KIND}-*.safetensors"):
            try:
                maps = load_maps(path)
            except (RepairError, OSError) as error:
                logger.warning("%s is not used: %s", path, error)
                continue
            made_for = (maps.model_fingerprint, maps.text_fingerprint, len(maps.layers))
            if made_for == (self._fingerprint, text, self.num_layers):
                kept.append((path.stat().st_mtime, path))
        if kept:
            _, path = max(kept)
            logger.info("Fitted before: %s", path)
            return path
        key = transformers_repair_key(
            model=self._fingerprint,
            tokenizer=tokenizer_fingerprint(self._directory),
            dtype=dtype,
            max_context=max_context,
            text=text,
            num_tokens=settings.calibration_tokens,
        )
        state = StateDirectory(settings.state_dir)
        path = state.path_of(_REPAIR_KIND, key).with_suffix(".safetensors")
        import torch

        settings.state_dir.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        with refused_as("calibration", RepairError):
            maps = fit_repair(
                model,
                [torch.tensor(window, device=model.device) for window in windows],
                model_fingerprint=self._fingerprint,
                text_fingerprint=text,
                group_size=layers_at_a_time(model.config.get_text_config().hidden_size),
                on_fitted=lambda *c: self._progress.advance("Fitting the closed-form maps", *c),
            )
        save_maps(maps, path)
        return path


class _Loaded:
    """The model, the windows of token ids to train and to judge on, and the closed-form maps."""

    def __init__(
        self,
        model: Any,
        windows: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        closed_form: Path,
        training: Training,
    ) -> None:
        self.model = model
        self.windows = windows
        self.held_out = held_out
        self.closed_form = closed_form
        self.training = training
