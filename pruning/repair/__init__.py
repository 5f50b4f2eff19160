"""Repair: a linear map for each layer that stands in for it where it is skipped.

A skipped layer turns the residual stream x into x + x M instead of x. M is fitted in closed form
on the dense model's activations, so that one map for each layer serves every depth.
"""

from __future__ import annotations

from pruning.repair.errors import RepairError
from pruning.repair.fit import FittedMap, fit_map, min_fit_tokens
from pruning.repair.gram import GramEstimator
from pruning.repair.maps import LayerMap, RepairMaps
from pruning.repair.storage import load_maps, maps_fingerprint, save_maps
from pruning.repair.transformers_fit import fit_repair, split_windows

__all__ = [
    "FittedMap",
    "GramEstimator",
    "LayerMap",
    "RepairError",
    "RepairMaps",
    "fit_map",
    "fit_repair",
    "load_maps",
    "maps_fingerprint",
    "min_fit_tokens",
    "save_maps",
    "split_windows",
]
