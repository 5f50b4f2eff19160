"""What the settings name: model, plan, levels and texts, checked before the model is loaded."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pruning.checkpoint import (
    CheckpointError,
    check_checkpoint,
    read_config,
    tensor_names,
    weight_files,
)
from pruning.fingerprint import model_fingerprint, tokenizer_fingerprint
from pruning.plan import Plan, PlanError
from pruning.quantization import Order, QuantizationError, plan_of_base
from pruning.surgery import SurgeryError, count_layers
from pruning.text import TextError, load_texts
from server.calibration.own_text_store import OwnTextStore
from server.config import Settings
from server.depth.auto_rules import AutoRules
from server.depth.levels import (
    DEFAULT_LEVELS,
    LevelSpec,
    check_levels,
    default_levels,
    spec_of,
)
from server.engine.elastic.architectures import UnsupportedArchitecture, elastic_architecture
from server.engine.elastic.compatibility import check_quantized_kernels
from server.engine.environment import check_directories
from server.engine.quantized_checkpoint import check_loadable, experts_problem
from server.errors import FathomError, InvalidArgument
from server.file_hashes import FileHashes
from server.model.companions import check_companions
from server.model.demo_corpus import Part, documents
from server.model.quantized import QuantizedModel, checked_quantization
from server.model.source import ModelSource, find_model

# Tokens are rarely longer; bounds what is read of a large text.
_CHARACTERS_PER_TOKEN = 16


# The value of the setting ``calibration`` for text that the model writes.
OWN_TEXT = "own"


class StartError(Exception):
    """The server cannot start like this; one line that names the setting and what is allowed."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a server is started with."""

    source: ModelSource
    fingerprint: str
    # The fingerprint of whatever decides which tokens a text has.
    tokenizer: str
    num_layers: int
    levels: tuple[LevelSpec, ...]
    default_level: str
    # None: to be made.
    plan: Plan | None
    # None: the model is to write them, once it has been loaded.
    texts: Sequence[str] | None
    held_out_texts: Sequence[str]
    # None: the model is served as it is.
    quantized: QuantizedModel | None = None


def read_inputs(settings: Settings) -> Inputs:
    """Read what the settings name.

    Raises:
        StartError: something is missing, damaged, or does not fit the model.
    """
    with refused_as("environment"):
        check_directories()
    with refused_as("model", CheckpointError, UnsupportedArchitecture):
        source = find_model(settings.model, settings.revision)
        check_checkpoint(source.directory)
        num_layers = _num_layers(source.directory, elastic=settings.engine == "elastic")
        check_companions(source.directory, settings.engine_args)
        check_loadable(source.directory, settings.dtype, settings.engine_args)
        _check_path(source.directory)
        if settings.heal:
            check_healable(source.directory)
        # Last, as it may read all of the weights.
        fingerprint = model_fingerprint(source.directory, FileHashes(settings.state_dir))
        tokenizer = tokenizer_fingerprint(source.directory)
    with refused_as("levels"):
        levels, default_level = chosen_levels(settings, num_layers)
    with refused_as("calibration", TextError):
        texts = (
            own_text_store(settings, fingerprint, tokenizer).kept()
            if _is_to_be_written(settings)
            else calibration_texts(settings, source.directory)
        )
    with refused_as("state_dir", CheckpointError):
        if settings.quantize is not None or settings.engine == "dedicated":
            _check_path(settings.state_dir)  # checkpoints are made there
    quantized = None if texts is None else _quantized(settings, source, fingerprint, texts)
    plan = None
    if settings.plan is not None:
        with refused_as("plan", PlanError, OSError):
            plan = Plan.load(settings.plan)
        with refused_as("model", QuantizationError):
            plan = plan_of_base(plan, source.directory, fingerprint)
        with refused_as(f"plan: {settings.plan}", PlanError):
            if quantized is None or plan.model_fingerprint != quantized.kept_fingerprint():
                plan.check_model(fingerprint, num_layers)
    with refused_as("quality_text", TextError):
        measured_on = held_out_texts(settings)
    return Inputs(
        source=source,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        num_layers=num_layers,
        levels=levels,
        default_level=default_level,
        plan=plan,
        texts=texts,
        held_out_texts=measured_on,
        quantized=quantized,
    )


def check_healable(directory: Path) -> None:
    """Raise :class:`InvalidArgument` for a model that maps cannot be trained with."""
    if "quantization_config" in read_config(directory):
        allowed = "a model that is not quantized: quantized weights pass no gradients on"
        raise InvalidArgument("heal", str(directory), allowed)


@contextmanager
def refused_as(setting: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise :class:`StartError` for ``errors``, which do not name the setting that led to them,
    and for those of :mod:`server.errors`, which do.
    """
    try:
        yield
    except FathomError as error:
        raise StartError(str(error)) from error
    except errors as error:
        raise StartError(f"{setting}: {error}") from error


def chosen_levels(settings: Settings, num_layers: int) -> tuple[tuple[LevelSpec, ...], str]:
    """Return the levels for a model of ``num_layers``, and the name of the default one.

    Default levels that other settings name are not optional. Raises :class:`InvalidArgument` for
    a level that the model, or the engine, does not have.
    """
    can_search = settings.engine == "elastic"
    specs = DEFAULT_LEVELS if can_search else tuple(map(spec_of, default_levels(num_layers)))
    if settings.levels:
        specs = tuple(settings.levels.values())
        check_levels(spec.resolve(num_layers) for spec in specs)
        if not can_search:
            for spec in specs:
                spec.refuse_search()
    names = [spec.name for spec in specs]
    default_level = settings.default_level or names[0]
    if default_level not in names:
        raise InvalidArgument("default_level", default_level, f"one of {', '.join(names)}")
    for name in settings.auto_levels:
        if name not in names:
            raise InvalidArgument("auto_levels", name, f"some of {', '.join(names)}")
    for name, share in settings.memory_shares.items():
        if name not in names:
            raise InvalidArgument(f"memory_shares.{name}", share, f"one of {', '.join(names)}")
    named = {default_level, *settings.auto_levels}
    specs = tuple(replace(s, optional=s.optional and s.name not in named) for s in specs)
    return specs, default_level


def auto_rules(settings: Settings) -> AutoRules:
    """Return what the server may choose for requests that leave the depth to it."""
    return AutoRules(
        levels=settings.auto_levels,
        by_default=settings.auto_by_default,
        time_to_first_token=settings.auto_first_token_seconds,
        inter_token_latency=settings.auto_inter_token_seconds,
        max_quality_loss=settings.auto_max_quality_loss,
        min_agreement=settings.auto_min_agreement,
        max_writing_loss=settings.auto_max_writing_loss,
        max_repetition=settings.auto_max_repetition,
        max_choosing_loss=settings.auto_max_choosing_loss,
        hold_seconds=settings.auto_hold_seconds,
    )


def calibration_texts(settings: Settings, directory: Path) -> Sequence[str]:
    """Return the texts to rank the layers on; raises :class:`TextError` where there are none.

    The model in ``directory`` may have written them.
    """
    if not _is_own_text(settings):
        return _texts(settings.calibration, Part.CALIBRATION, settings.calibration_tokens)
    fingerprint = model_fingerprint(directory, FileHashes(settings.state_dir))
    kept = own_text_store(settings, fingerprint, tokenizer_fingerprint(directory)).kept()
    if kept is None:
        raise TextError(
            f"got {OWN_TEXT!r}, but {settings.state_dir} has no {settings.calibration_tokens} "
            "tokens that this model has written; allowed: a file, which 'fathom own-text' writes, "
            f"or {OWN_TEXT!r} once 'fathom serve' has started with it on the elastic engine, "
            "without quantize"
        )
    return kept


def own_text_store(settings: Settings, fingerprint: str, tokenizer: str) -> OwnTextStore:
    """Return what keeps the text that the model writes; the arguments are fingerprints."""
    return OwnTextStore(
        settings.state_dir,
        model=fingerprint,
        tokenizer=tokenizer,
        num_tokens=settings.calibration_tokens,
    )


def _is_to_be_written(settings: Settings) -> bool:
    """Return whether the model of a server writes its calibration text, if it has not before."""
    can_write = settings.engine == "elastic" and settings.quantize is None
    return can_write and _is_own_text(settings)


def _is_own_text(settings: Settings) -> bool:
    """A file or directory of that name comes first, as with the names of models."""
    return settings.calibration == OWN_TEXT and not Path(OWN_TEXT).exists()


def held_out_texts(settings: Settings) -> Sequence[str]:
    """Return the texts to measure quality on; raises :class:`TextError` where there are none."""
    return _texts(settings.quality_text, Part.HELD_OUT, settings.quality_tokens)


def _quantized(
    settings: Settings, source: ModelSource, fingerprint: str, texts: Sequence[str]
) -> QuantizedModel | None:
    with refused_as("quantize", QuantizationError, SurgeryError, CheckpointError):
        quantization = checked_quantization(settings, source.directory)
        if quantization is None:
            return None
        if Order(settings.order) is Order.PRUNE_THEN_QUANTIZE:
            reason = "has one set of weights for all depths"
            if settings.engine == "dedicated":
                reason = "exports its levels from what is quantized"
            allowed = (
                f"{Order.QUANTIZE_THEN_PRUNE} with the {settings.engine} engine, which {reason}; "
                "fathom export writes one depth in either order"
            )
            raise InvalidArgument("order", settings.order, allowed)
        check_quantized_kernels(quantization.bits, settings.dtype)
        tensors = set[str]().union(*map(tensor_names, weight_files(source.directory)))
        if problem := experts_problem(tensors):
            raise InvalidArgument("quantize", settings.quantize, f"nothing here: {problem}")
        with refused_as("calibration", TextError):
            return QuantizedModel(settings, source, fingerprint, texts, quantization)


def _check_path(path: Path) -> None:
    """Raise :class:`CheckpointError` for a path in which vLLM finds no weights."""
    if glob.has_magic(str(path)):
        raise CheckpointError(
            f"{path}: allowed: a path without *, ? and [, which vLLM takes for patterns"
        )


def _num_layers(directory: Path, *, elastic: bool) -> int:
    if not elastic:
        return count_layers(directory)
    config = read_config(directory)
    elastic_architecture(config.get("architectures") or [])
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise CheckpointError(
            f"{directory / 'config.json'}: num_hidden_layers: found {num_layers!r}, "
            "allowed: 1 or more"
        )
    return num_layers


def _texts(source: str | None, part: Part, max_tokens: int) -> Sequence[str]:
    if source is None:
        return list(documents([part]))
    max_characters = min(max_tokens * _CHARACTERS_PER_TOKEN, sys.maxsize)
    return load_texts(source, max_characters=max_characters)
