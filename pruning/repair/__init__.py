"""Repair: a linear map for each layer that stands in for it where it is skipped.

A skipped layer turns the residual stream x into x + x M instead of x. M is fitted in closed form
on the dense model's activations, so that one map for each layer serves every depth. Maps that
are trained further, for one set of skipped layers, are healed (:mod:`pruning.repair.healing`);
gated MLPs can be trained in their place (:mod:`pruning.repair.gated_healing`).
"""

from __future__ import annotations

from pruning.repair.distillation import HealingStep
from pruning.repair.errors import RepairError
from pruning.repair.fit import FittedMap, check_fit_tokens, fit_map, min_fit_tokens
from pruning.repair.gated_healing import heal_gated
from pruning.repair.gated_mlp import GatedMlp, GatedMlps
from pruning.repair.gram import GramEstimator, layers_at_a_time
from pruning.repair.healing import heal
from pruning.repair.maps import Healing, HealingKind, LayerMap, RepairMaps
from pruning.repair.storage import (
    MapsSummary,
    load_maps,
    load_stand_ins,
    maps_fingerprint,
    save_gated_mlps,
    save_maps,
    summarize_maps,
)
from pruning.repair.transformers_fit import fit_repair
from pruning.repair.windows import split_windows

__all__ = [
    "FittedMap",
    "GatedMlp",
    "GatedMlps",
    "GramEstimator",
    "Healing",
    "HealingKind",
    "HealingStep",
    "LayerMap",
    "MapsSummary",
    "RepairError",
    "RepairMaps",
    "check_fit_tokens",
    "fit_map",
    "fit_repair",
    "heal",
    "heal_gated",
    "layers_at_a_time",
    "load_maps",
    "load_stand_ins",
    "maps_fingerprint",
    "min_fit_tokens",
    "save_gated_mlps",
    "save_maps",
    "split_windows",
    "summarize_maps",
]
