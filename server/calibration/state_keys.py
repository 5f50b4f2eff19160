"""The stores of a server's plan and measurements, under the keys of what they depend on."""

from __future__ import annotations

from collections.abc import Sequence

from pruning.fingerprint import text_fingerprint
from server.calibration.hardware import describe_hardware
from server.calibration.policy_store import PlanFile, PolicyStore
from server.calibration.search_store import SearchStore
from server.calibration.served_metrics import AUTO, searches
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.depth.level_search import compared_depths
from server.depth.levels import DEFAULT_LEVELS
from server.engine.base import ModelInfo
from server.state import StateDirectory
from server.state_keys import (
    Key,
    Measuring,
    plan_key,
    probes_key,
    quality_key,
    repair_key,
    speed_key,
    transformers_plan_key,
)


def policy_store(
    settings: Settings,
    model: ModelInfo,
    *,
    fingerprint: str,
    tokenizer: str,
    num_layers: int,
    texts: Sequence[str],
    held_out_texts: Sequence[str],
) -> PolicyStore:
    """Return the store for ``model``, as the engine has loaded it.

    ``fingerprint`` is that of the model, ``tokenizer`` that of its tokenizer.
    """
    measuring = _measuring(settings, model, fingerprint, tokenizer)
    held_out = text_fingerprint(held_out_texts)
    return PolicyStore(
        StateDirectory(settings.state_dir),
        PlanFile(fingerprint, num_layers),
        plan_key=_plan_key(settings, measuring, text_fingerprint(texts), held_out, num_layers),
        repair_key=repair_key(
            measuring, text=text_fingerprint(texts), num_tokens=settings.calibration_tokens
        ),
        quality_key=quality_key(measuring, text=held_out, num_tokens=settings.quality_tokens),
        probes_key=probes_key(measuring, text=held_out, num_tokens=settings.quality_tokens),
        speed_key=speed_key(
            measuring,
            text=held_out,
            num_tokens=settings.quality_tokens,
            hardware=describe_hardware(),
            versions=measuring_versions(),
            max_num_seqs=settings.max_num_seqs,
        ),
    )


def search_store(
    settings: Settings, model: ModelInfo, *, fingerprint: str, tokenizer: str
) -> SearchStore:
    """Return the store of searches; the arguments are those of :func:`policy_store`."""
    measuring = _measuring(settings, model, fingerprint, tokenizer)
    return SearchStore(StateDirectory(settings.state_dir), measuring)


def _measuring(settings: Settings, model: ModelInfo, fingerprint: str, tokenizer: str) -> Measuring:
    return Measuring(
        model=fingerprint,
        tokenizer=tokenizer,
        engine=settings.engine,
        dtype=model.dtype,
        max_context=model.max_context,
        engine_args=settings.engine_args,
    )


def _settled_at(settings: Settings, num_layers: int) -> list[list[int]] | None:
    if not settings.calibration_until_settled:
        return None
    specs = tuple(settings.levels.values()) or DEFAULT_LEVELS
    depths = compared_depths(specs, num_layers)
    return sorted([pair.prefill_layers, pair.decode_layers] for pair in depths)


def _plan_key(
    settings: Settings, measuring: Measuring, text: str, held_out: str, num_layers: int
) -> Key:
    if settings.engine == "elastic":
        compared_on = None
        if settings.metric == AUTO:
            depths = [(spec.depth, spec.prefill_depth) for spec in settings.levels.values()]
            compared_on = {
                "text": held_out,
                "num_tokens": settings.quality_tokens,
                "levels": sorted(depths, key=str),
            }
        does_search = searches(settings.metric)
        return plan_key(
            measuring,
            text=text,
            num_tokens=settings.calibration_tokens,
            metric=settings.metric,
            search_tokens=settings.search_tokens if does_search else 0,
            # A search lets maps in closed form stand in, also where levels have healed ones.
            repair="closed-form" if does_search and settings.repair != "none" else "none",
            compared_on=compared_on,
            settled_at=_settled_at(settings, num_layers),
        )
    return transformers_plan_key(
        model=measuring.model,
        tokenizer=measuring.tokenizer,
        dtype=measuring.dtype,
        max_context=measuring.max_context,
        text=text,
        num_tokens=settings.calibration_tokens,
        metric=settings.metric,
    )
