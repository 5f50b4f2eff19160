"""Settings of plans, levels and automatic depth."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    Field,
    FilePath,
    field_validator,
    model_validator,
)
from pydantic_settings import NoDecode

from pruning.repair.distillation import DEFAULT_STEPS
from pruning.repair.maps import HealingKind
from server.config.errors import conflict, not_allowed
from server.config.values import names_from, pairs_from
from server.depth.levels import LevelSpec, Limit

# Those of pruning.metrics, and the better one of two of them.
ServedMetric = Literal[
    "block_influence",
    "relative_magnitude",
    "norm",
    "angular_distance",
    "reverse_order",
    "sequential",
    "single_removal_kl",
    "greedy_kl",
    "auto",
]
DEFAULT_SEARCH_TOKENS = 1 << 19

_LEVEL_ALLOWED = (
    "a number of layers (1 or more), a prune ratio (0.0 to less than 1, with a decimal point), "
    "{depth: ..., prefill_depth: ...} of these, {max_writing_loss: ...}, {max_choosing_loss: ...} "
    "of at most 1, or {max_quality_loss: ..., prompt_only: ...}, a number of 0 or more and true or "
    "false"
)
_LIMITS = frozenset(kind.value for kind in Limit)
_LEVELS_SYNTAX = (
    "NAME=DEPTH or NAME=PREFILL/DECODE, separated by commas, or a JSON object; a depth is "
    "a number of layers or, with a decimal point, a prune ratio"
)


def _depth_from(value: object) -> int | float:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise not_allowed(_LEVEL_ALLOWED) from None
    is_depth = (isinstance(value, int) and not isinstance(value, bool) and value >= 1) or (
        isinstance(value, float) and 0 <= value < 1
    )
    if not is_depth:
        raise not_allowed(_LEVEL_ALLOWED)
    return typing.cast("int | float", value)


def _level_from(value: object) -> LevelSpec:
    depth: object
    prefill_depth: object
    match value:
        case LevelSpec():
            return value
        case dict() if value.keys() & _LIMITS:
            return _searched_level_from(value)
        case {"depth": depth, "prefill_depth": prefill_depth, **others} if not others:
            pass
        case {"depth": depth, **others} if not others:
            prefill_depth = None
        case str() if "/" in value:
            prefill_depth, depth = value.split("/", maxsplit=1)
        case _:
            depth, prefill_depth = value, None
    return LevelSpec(
        name="",  # the key of the mapping, which is not known here
        depth=_depth_from(depth),
        prefill_depth=None if prefill_depth is None else _depth_from(prefill_depth),
    )


def _searched_level_from(fields: Mapping[str, object]) -> LevelSpec:
    prompt_only = fields.get("prompt_only", False)
    if fields.keys() - _LIMITS - {"prompt_only"} or not isinstance(prompt_only, bool):
        raise not_allowed(_LEVEL_ALLOWED)
    limits: dict[str, float] = {}
    for name in _LIMITS & fields.keys():
        limit = fields[name]
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise not_allowed(_LEVEL_ALLOWED)
        most = 1.0 if name == Limit.CHOOSING.value else sys.float_info.max
        if not 0 <= limit <= most:
            raise not_allowed(_LEVEL_ALLOWED)
        limits[name] = float(limit)
    return LevelSpec(
        name="",
        prompt_only=prompt_only,
        max_quality_loss=limits.get(Limit.QUALITY.value),
        max_writing_loss=limits.get(Limit.WRITING.value),
        max_choosing_loss=limits.get(Limit.CHOOSING.value),
    )


def _levels_from(value: object) -> object:
    return pairs_from(value, _LEVELS_SYNTAX)


Level = Annotated[LevelSpec, BeforeValidator(_level_from)]


class DepthSettings(BaseModel):
    calibration: str | None = Field(
        None,
        description="Text to rank the layers on: a file, a directory, JSON lines or a Hugging "
        "Face dataset; own: what the model writes itself at the first start, kept in `state_dir`; "
        "none: the documentation of Python's standard library.",
    )
    calibration_tokens: Annotated[int, Ge(64)] = Field(
        32768, description="Tokens of that text to rank the layers on."
    )
    calibration_until_settled: bool = Field(
        True,
        description="Whether that ends with fewer tokens, when other text of the kind would leave "
        "out the same layers at the levels.",
    )
    plan: FilePath | None = Field(
        None,
        description="Plan file to use instead of a calibration; that of another model is refused.",
    )
    metric: ServedMetric = Field(
        "block_influence",
        description="What the layers are ranked by where no plan is given or kept; "
        "`single_removal_kl` and `greedy_kl` search with the elastic engine; `auto`: the better "
        "one of `block_influence` and `greedy_kl` on held-out text.",
    )
    search_tokens: Annotated[int, Ge(1024)] = Field(
        DEFAULT_SEARCH_TOKENS,
        description="Tokens that such a search may run through the model in all; more of them "
        "compare layers on more text.",
    )
    repair: Literal["auto", "none", "closed-form", "healed"] = Field(
        "auto",
        description="What stands in for skipped layers; closed-form: a linear map for each, fitted "
        "on the calibration text at the first start and kept in `state_dir`, where that brings "
        "the levels closer to the dense model; auto: the same with the elastic engine, but fitted "
        "while the server serves, in gaps of load; healed: at levels that `fathom heal` or `heal` "
        "have trained maps or gated MLPs for, those instead, where they are better still.",
    )
    heal: bool = Field(
        False,
        description="Whether a process beside the server trains maps or gated MLPs for the levels "
        "after the start, at low priority; they are put in force where they are better on "
        "`quality_text`.",
    )
    heal_kind: HealingKind = Field(
        "maps",
        description="What is trained, also by `fathom heal`: a linear map in place of each skipped "
        "layer, or a gated MLP in place of each run of them, as in ShortGPT.",
    )
    heal_intermediate_size: Annotated[int, Ge(1)] | None = Field(
        None,
        description="Hidden size of such MLPs, 2048 in ShortGPT; none: that with which they have "
        "as many parameters as the maps. For `gated-mlp` alone.",
    )
    heal_steps: Annotated[int, Ge(1)] = Field(
        DEFAULT_STEPS,
        description="Steps of such a training, and of `fathom heal`, each on up to 512 tokens.",
    )
    heal_seed: Annotated[int, Ge(0)] = Field(
        0,
        description="Seed of the order in which such a training takes its text, and of the weights "
        "that gated MLPs begin with.",
    )
    quality_text: str | None = Field(
        None,
        description="Text to measure quality on: a file, a directory, JSON lines or a Hugging Face "
        "dataset; none: a part of the standard library's documentation that neither calibration "
        "nor the demo model has seen.",
    )
    quality_tokens: Annotated[int, Ge(64)] = Field(
        8192, description="Tokens of that text to measure quality on."
    )
    quality_depths: Literal["all", "levels"] | None = Field(
        None,
        description="Whether quality is measured at every depth or at the levels alone; none: "
        "every depth of models of up to 16 layers.",
    )
    startup_seconds: Annotated[float, Ge(0), AllowInfNan()] = Field(
        30.0,
        description="Seconds for which a start measures the quality and the speed of the levels. "
        "What is left then, and what no level needs, is measured while serving, when no request "
        "runs. 0: all of it; inf: nothing, a start measures everything.",
    )
    levels: Annotated[dict[str, Level], NoDecode, BeforeValidator(_levels_from)] = Field(
        {},
        description="Operating points by name: a number of layers (12), a prune ratio (0.25), "
        "`{depth: 16, prefill_depth: 12}`, or by what they may lose: `{max_quality_loss: 0.25}` is "
        "the shallowest depth with at most 25 % more perplexity than the dense model, with "
        "`prompt_only: true` for the prompt alone; `max_writing_loss` and `max_choosing_loss` "
        "limit what it may lose in writing and in choosing. As a flag or a variable a JSON object, "
        "or `NAME=DEPTH` or `NAME=PREFILL/DECODE`, separated by commas. None: the default levels.",
        json_schema_extra={"default_text": "default levels"},
    )
    default_level: str | None = Field(
        None, description="Level of requests that name no depth; none: the first one."
    )
    auto_levels: Annotated[tuple[str, ...], NoDecode, BeforeValidator(names_from)] = Field(
        (),
        description="Levels of automatic depth: the first is used without load, each further one "
        "under more load. None: the default level and all that run fewer layers for generated "
        "tokens.",
    )
    auto_by_default: bool = Field(
        False, description="Whether requests that name no depth get automatic depth."
    )
    auto_first_token_seconds: Annotated[float, Gt(0)] = Field(
        1.0,
        description="Seconds to the first token above which automatic depth goes to a shallower "
        "level.",
    )
    auto_inter_token_seconds: Annotated[float, Gt(0)] = Field(
        0.1, description="Seconds between two tokens above which it does, too."
    )
    auto_hold_seconds: Annotated[float, Ge(0)] = Field(
        30.0, description="Seconds of low load after which it goes back to the next deeper level."
    )
    auto_max_quality_loss: Annotated[float, Ge(0)] = Field(
        0.25,
        description="Largest loss of quality of a level that automatic depth may use: its "
        "perplexity divided by that of the dense model, less 1. For `Score` only where "
        "`auto_max_choosing_loss` is 1.",
    )
    auto_min_agreement: Annotated[float, Ge(0), Le(1)] = Field(
        0.0,
        description="Smallest agreement of such a level: the share of positions where its most "
        "likely next token is that of the dense model.",
    )
    auto_max_writing_loss: Annotated[float, Ge(0)] = Field(
        0.5,
        description="Largest loss in writing of a level that automatic depth may use for "
        "`Generate`: the perplexity under the dense model of what the level writes divided by "
        "that of what the dense model writes, less 1; inf: any.",
    )
    auto_max_repetition: Annotated[float, Ge(0), Le(1)] = Field(
        0.2,
        description="Largest repetition of such a level: the share of sequences of four tokens "
        "that were there before, less the dense model's own; 1: any.",
    )
    auto_max_choosing_loss: Annotated[float, Ge(0), Le(1)] = Field(
        0.15,
        description="Largest loss in choosing of a level that automatic depth may use for "
        "`Score`: the share of passages whose true continuation the dense model finds, less that "
        "of the level; 1: any, and `auto_max_quality_loss` holds instead.",
    )

    @field_validator("levels")
    @classmethod
    def _name_levels(cls, levels: dict[str, LevelSpec]) -> dict[str, LevelSpec]:
        return {name: dataclasses.replace(spec, name=name) for name, spec in levels.items()}

    @model_validator(mode="after")
    def _check_default_level(self) -> DepthSettings:
        if self.levels and self.default_level and self.default_level not in self.levels:
            allowed = f"one of the levels: {', '.join(self.levels)}"
            raise conflict("default_level", repr(self.default_level), allowed)
        return self
