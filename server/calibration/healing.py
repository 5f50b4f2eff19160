"""What was trained in place of closed-form maps, where it brings levels closer to dense."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from pruning.probes import Probes
from pruning.quality import Quality
from pruning.repair import HealingKind, RepairError
from server.calibration.calibrator import Calibrator, OnProgress
from server.calibration.healed_store import HEALED_NAMES, HEALING_KINDS, HealedStore
from server.calibration.measurements import Measurements
from server.calibration.policy_store import PolicyStore
from server.depth.levels import DepthPair
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from server.engine.base import RepairsLayers

# Standard errors by which a probe must be worse to count.
_NUM_STDERRS = 2.0
# By how much the share of repeated 4-grams may rise: its noise is not known.
_MAX_MORE_REPEATED = 0.05

logger = logging.getLogger(__name__)


def what_is_not_better(before: Quality, after: Quality) -> str:
    """Return what of the quality on held-out text is not better than before; empty: nothing.

    This decides whether healed maps and gated MLPs are used, offline and in the server, and there
    :func:`what_is_worse` does, too.
    """
    problems = []
    for name, old, new in (
        ("perplexity", before.perplexity, after.perplexity),
        ("divergence from the dense model", before.kl_nats, after.kl_nats),
    ):
        if old is None or new is None:
            problems.append(f"{name} was not measured")
        elif new >= old:
            problems.append(f"{name} {new:.4g}, before: {old:.4g}")
    return "; ".join(problems)


def what_is_worse(before: Probes, after: Probes) -> str:
    """Return what a level does worse than before, by its probes; empty: nothing.

    The probes are small, so that a difference counts only beyond its noise. What was not measured
    of both is not compared.
    """
    problems = []
    old, new = before.writing, after.writing
    if old is not None and new is not None:
        if _exceeds(new.ratio, new.ratio_stderr, old.ratio, old.ratio_stderr):
            problems.append(
                f"written text has {new.ratio:.3g} times dense's perplexity, "
                f"before: {old.ratio:.3g}"
            )
        if new.repeated_share > old.repeated_share + _MAX_MORE_REPEATED:
            problems.append(
                f"repeats {100 * new.repeated_share:.0f} % of what it writes, "
                f"before: {100 * old.repeated_share:.0f} %"
            )
    chose, chooses = before.choosing, after.choosing
    if (
        chose is not None
        and chooses is not None
        and _exceeds(
            chose.accuracy, chose.accuracy_stderr, chooses.accuracy, chooses.accuracy_stderr
        )
    ):
        problems.append(
            f"chooses {100 * chooses.accuracy:.0f} % right, before: {100 * chose.accuracy:.0f} %"
        )
    return "; ".join(problems)


def _exceeds(
    value: float | None, stderr: float | None, other: float | None, other_stderr: float | None
) -> bool:
    """Return whether ``value`` is larger by more than the noise of the two."""
    if value is None or other is None:
        return False
    return value - other > _NUM_STDERRS * math.hypot(stderr or 0.0, other_stderr or 0.0)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The policy with what was trained, and what is not better with it; empty: nothing is."""

    policy: DepthPolicy
    fingerprint: str
    problem: str


class HealedLevels:
    """Judges healed maps and gated MLPs at the levels that they serve, in the engine in use."""

    def __init__(
        self,
        engine: RepairsLayers,
        calibrator: Calibrator,
        store: PolicyStore,
        kept: HealedStore,
    ) -> None:
        self._engine = engine
        self._calibrator = calibrator
        self._store = store
        self._kept = kept

    async def with_kept(self, policy: DepthPolicy, on_progress: OnProgress) -> DepthPolicy:
        """Return the policy with what is kept for its levels, where that is better.

        Where maps and MLPs are kept for the same layers, the MLPs must be better than the maps.
        """
        for skipped in policy.healable_levels():
            for kind in HEALING_KINDS:
                path = self._kept.find(skipped, kind)
                if path is not None:
                    policy = await self._with(policy, skipped, path, kind, on_progress)
        return policy

    async def _with(
        self,
        policy: DepthPolicy,
        skipped: tuple[int, ...],
        path: Path,
        kind: HealingKind,
        on_progress: OnProgress,
    ) -> DepthPolicy:
        try:
            found = await self.judge(policy, skipped, path, on_progress)
        except (RepairError, OSError) as error:
            logger.warning("%s are not used: %s", HEALED_NAMES[kind], error)
            return policy
        name = f"{HEALED_NAMES[kind]} of {self.name(policy, skipped)}"
        if found.problem:
            logger.warning("%s are not used: %s", name, found.problem)
            return policy
        logger.info("%s: %s", name, path)
        return found.policy

    async def judge(
        self, policy: DepthPolicy, skipped: tuple[int, ...], path: Path, on_progress: OnProgress
    ) -> Judgement:
        """Load what is in ``path`` into the engine, and compare it with what ``policy`` has.

        It is better only if it is at every level that it serves, and is probed only if it is.
        Raises :class:`RepairError` and :class:`OSError` for a file that cannot be loaded, and
        :class:`EngineDead`.
        """
        fingerprint = await self._engine.install_repair(path)
        healed = policy.with_healed(skipped, fingerprint)
        pairs = policy.healable_levels()[skipped]
        measured = Measurements(self._calibrator, self._store, on_progress)
        before = await measured.qualities(policy, pairs)
        after = await measured.qualities(healed, pairs)
        problems = [
            f"{problem} at depth {pair}"
            for pair in pairs
            if (problem := what_is_not_better(before[pair], after[pair]))
        ]
        probes: dict[DepthPair, Probes] = {}
        if not problems:
            old = await measured.probes(policy, pairs)
            probes = await measured.probes(healed, pairs)
            problems = [
                f"{problem} at depth {pair}"
                for pair in pairs
                if (problem := what_is_worse(old[pair], probes[pair]))
            ]
        judged = healed.with_measured(Measured(after, probes=probes))
        return Judgement(judged, fingerprint, "; ".join(problems))

    async def install(self, path: Path) -> str:
        """Let the engine load this file from now on; return its fingerprint."""
        return await self._engine.install_repair(path)

    def name(self, policy: DepthPolicy, skipped: tuple[int, ...]) -> str:
        """Return what the log calls the depth that skips these layers."""
        return f"{policy.num_layers - len(skipped)} of {policy.num_layers} layers"
