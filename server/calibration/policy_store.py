"""Plan and measurements of one model, kept between starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pruning.plan import Plan
from pruning.probes import Probes
from pruning.quality import Quality
from pruning.repair import RepairError, load_maps
from server.depth.levels import DepthPair
from server.depth.measured import Measured, Speed
from server.depth.policy import DepthPolicy
from server.engine.base import LayerSelection
from server.state import JsonEntry, StateDirectory

logger = logging.getLogger(__name__)

_REPAIR_KIND = "repair"

M = TypeVar("M")

Key = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Row(Generic[M]):
    """A measurement with these layers left out, at whatever plan and depth."""

    layers: LayerSelection
    measurement: M


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan in its own format, so that a kept file can be given to ``--plan``."""

    model_fingerprint: str
    num_layers: int

    def load(self, path: Path) -> Plan:
        plan = Plan.load(path)
        plan.check_model(self.model_fingerprint, self.num_layers)
        return plan

    def save(self, value: Plan, path: Path) -> None:
        value.save(path)


class PolicyStore:
    """Keeps plan, qualities, probes and speeds, each under a key of all that it depends on."""

    def __init__(
        self,
        state: StateDirectory,
        plan_file: PlanFile,
        *,
        plan_key: Key,
        repair_key: Key,
        quality_key: Key,
        probes_key: Key,
        speed_key: Key,
    ) -> None:
        self._state = state
        self._plan_file = plan_file
        self._plan_key = plan_key
        self._repair_key = repair_key
        self._qualities: _Table[Quality] = _Table(
            state, "quality", quality_key, JsonEntry(list[_Row[Quality]], quality_key)
        )
        self._probes: _Table[Probes] = _Table(
            state, "probes", probes_key, JsonEntry(list[_Row[Probes]], probes_key)
        )
        self._speeds: _Table[Speed] = _Table(
            state, "speed", speed_key, JsonEntry(list[_Row[Speed]], speed_key)
        )

    async def plan(self, make: Callable[[], Awaitable[Plan]]) -> Plan:
        """Return the plan that is kept, or else the one that is made."""
        return await self._state.load_or_make("plan", self._plan_key, self._plan_file, make)

    async def kept_repair(self) -> Path | None:
        """Return the file of the repair maps that are kept; None: there is none that is whole."""
        path = self._repair_path
        return path if await asyncio.to_thread(self._is_kept, path) else None

    async def repair(self, make: Callable[[Path], Awaitable[None]]) -> Path:
        """Return the file of the repair maps that are kept, or else of those that ``make`` writes.

        Raises what ``make`` raises.
        """
        path = self._repair_path
        if not self._is_kept(path):
            async with self._state.locked(_REPAIR_KIND, self._repair_key):
                # Another server may have made it while this one waited.
                if not self._is_kept(path):
                    await make(path)
        return path

    @property
    def _repair_path(self) -> Path:
        return self._state.path_of(_REPAIR_KIND, self._repair_key).with_suffix(".safetensors")

    def _is_kept(self, path: Path) -> bool:
        if not path.exists():
            return False
        try:
            maps = load_maps(path)
            maps.check_model(
                self._plan_file.model_fingerprint, self._plan_file.num_layers, maps.hidden_size
            )
        except (RepairError, OSError) as error:
            logger.warning("%s is not used and will be made anew: %s", path, error)
            return False
        return True

    async def qualities(
        self,
        policy: DepthPolicy,
        depths: Sequence[DepthPair],
        make: Callable[[Sequence[DepthPair]], Awaitable[Mapping[DepthPair, Quality]]],
    ) -> dict[DepthPair, Quality]:
        """Return the qualities of ``depths``; those that are not kept are made."""
        return await self._qualities.complete(policy, depths, make)

    async def probes(
        self,
        policy: DepthPolicy,
        depths: Sequence[DepthPair],
        make: Callable[[Sequence[DepthPair]], Awaitable[Mapping[DepthPair, Probes]]],
    ) -> dict[DepthPair, Probes]:
        """Return what the probes of ``depths`` found; those that are not kept are made.

        So are those that were kept without a dense model, where there is one now.
        """
        return await self._probes.complete(policy, depths, make, policy.is_probed)

    async def speeds(
        self,
        policy: DepthPolicy,
        depths: Sequence[DepthPair],
        make: Callable[[Sequence[DepthPair]], Awaitable[Mapping[DepthPair, Speed]]],
    ) -> dict[DepthPair, Speed]:
        """Return the speeds of ``depths``; those that are not kept are made."""
        return await self._speeds.complete(policy, depths, make)

    def kept(self, policy: DepthPolicy, depths: Sequence[DepthPair]) -> Measured:
        """Return what is kept of the measurements of ``depths``."""
        return Measured(
            self._qualities.found(policy, depths),
            self._speeds.found(policy, depths),
            self._probes.found(policy, depths),
        )

    def save(self, policy: DepthPolicy) -> None:
        """Keep a policy that was measured while serving: the next start begins with it."""
        self._state.save("plan", self._plan_key, self._plan_file, policy.plan)
        self._qualities.add(policy, policy.qualities)
        self._probes.add(policy, policy.probes)
        self._speeds.add(policy, policy.speeds)


class _Table(Generic[M]):
    """Measurements of one kind, by the layers that were left out."""

    def __init__(
        self, state: StateDirectory, kind: str, key: Key, entry: JsonEntry[list[_Row[M]]]
    ) -> None:
        self._state = state
        self._kind = kind
        self._key = key
        self._entry = entry

    async def complete(
        self,
        policy: DepthPolicy,
        depths: Sequence[DepthPair],
        make: Callable[[Sequence[DepthPair]], Awaitable[Mapping[DepthPair, M]]],
        is_enough: Callable[[DepthPair, M], bool] = lambda depths, measurement: True,
    ) -> dict[DepthPair, M]:
        """Return the measurements of ``depths``; make those that are missing or not enough."""

        def kept() -> dict[DepthPair, M]:
            found = self.found(policy, depths)
            return {pair: value for pair, value in found.items() if is_enough(pair, value)}

        found = kept()
        if len(found) == len(depths):
            return found
        async with self._state.locked(self._kind, self._key):
            found = kept()
            missing = [pair for pair in depths if pair not in found]
            if missing:
                found |= await make(missing)
                self.add(policy, found)
        return found

    def add(self, policy: DepthPolicy, measurements: Mapping[DepthPair, M]) -> None:
        table = self._load()
        table |= {policy.selection(pair): value for pair, value in measurements.items()}
        rows = [_Row(layers, measurement) for layers, measurement in table.items()]
        self._state.save(self._kind, self._key, self._entry, rows)

    def found(self, policy: DepthPolicy, depths: Sequence[DepthPair]) -> dict[DepthPair, M]:
        """Return the measurements that are kept."""
        table = self._load()
        selections = {pair: policy.selection(pair) for pair in depths}
        return {pair: table[layers] for pair, layers in selections.items() if layers in table}

    def _load(self) -> dict[LayerSelection, M]:
        rows = self._state.load(self._kind, self._key, self._entry) or []
        return {row.layers: row.measurement for row in rows}
