"""A toy engine that can be repaired."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pruning.quality import Quality
from pruning.repair import (
    LayerMap,
    RepairError,
    RepairMaps,
    check_fit_tokens,
    load_maps,
    maps_fingerprint,
    save_maps,
)
from server.engine.base import LayerSelection, ProgressCallback
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine


class RepairingEngine(ToyEngine):
    """A toy whose pruned levels lose ``remaining`` of what they lose without repair."""

    def __init__(self, remaining: float = 0.5) -> None:
        super().__init__()
        self.num_fits = 0
        # While it is clear, no fit ends.
        self.fit_gate = asyncio.Event()
        self.fit_gate.set()
        self.installed: str | None = None
        self._path: Path | None = None
        self._remaining = remaining

    async def start(self) -> None:
        await super().start()
        if self._path is not None:
            try:
                load_maps(self._path)
            except (RepairError, OSError):
                self.installed = None

    async def fit_repair(
        self,
        windows: Sequence[Sequence[int]],
        path: Path,
        *,
        model_fingerprint: str,
        text_fingerprint: str,
        progress: ProgressCallback,
    ) -> None:
        check_fit_tokens(sum(map(len, windows)), 4)
        await self.fit_gate.wait()
        self.num_fits += 1
        maps = {layer: LayerMap(torch.eye(4) * layer, 1.0, 0.5) for layer in range(NUM_LAYERS)}
        save_maps(RepairMaps(maps, NUM_LAYERS, model_fingerprint, text_fingerprint, 64), path)
        progress(1, 1)

    async def install_repair(self, path: Path) -> str:
        self._path, self.installed = path, maps_fingerprint(path)
        return self.installed

    def has_repair(self, fingerprint: str) -> bool:
        return fingerprint == self.installed

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        qualities = await super().measure_quality(windows, selections, progress)
        return [
            quality
            if layers.repair is None or quality.kl_nats is None
            else replace(quality, kl_nats=quality.kl_nats * self._remaining)
            for layers, quality in zip(selections, qualities, strict=True)
        ]
