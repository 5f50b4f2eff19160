"""What stands in for skipped layers, as the front of the engine knows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pruning.repair import Healing, RepairError, summarize_maps
from server.engine.base import LayerSelection
from server.engine.vllm_client import VllmClient
from server.errors import FailedPrecondition

# Maps of a large model are some gigabytes.
_TIMEOUT_SECONDS = 600.0

logger = logging.getLogger(__name__)


class _Installed(NamedTuple):
    """A file of what stands in for skipped layers, and how it was trained; None: it was not."""

    path: Path
    healing: Healing | None


class RepairClient:
    """Loads repair maps and gated MLPs into the engine's workers, and knows which they have."""

    def __init__(self, llm: VllmClient) -> None:
        self._llm = llm
        # What requests may ask to stand in for the layers that they skip, by fingerprint.
        self._installed: dict[str, _Installed] = {}

    async def install(self, path: Path) -> str:
        """Let the maps or gated MLPs in ``path`` stand in for the layers that a request skips.

        Returns their fingerprint, which requests that want them carry in
        :attr:`LayerSelection.repair`. Requests may go on to ask for those that were installed
        before: requests with different maps share a batch. They are loaded again, from the same
        file, after the engine's process has ended. What was trained stands in for the layers that
        it was trained for, as :meth:`pruning.repair.Healing.serves` says; a request with other
        layers that asks for it is refused.

        Raises:
            RepairError: The maps are damaged, or do not fit the model.
            OSError: The file cannot be read.
        """
        summary = summarize_maps(path)
        await self._load(path, summary.fingerprint)
        self._installed[summary.fingerprint] = _Installed(path, summary.healing)
        return summary.fingerprint

    async def load_again(self) -> None:
        """Load all installed maps into a new process; forget those that can be had no longer."""
        for fingerprint, (path, _) in list(self._installed.items()):
            try:
                await self._load(path, fingerprint)
            except (RepairError, OSError) as error:
                logger.error("repair maps are not loaded again: %s", error)
                del self._installed[fingerprint]

    async def _load(self, path: Path, fingerprint: str) -> None:
        await call_workers(self._llm, "fathom_load_stand_ins", str(path), fingerprint)

    def has(self, fingerprint: str) -> bool:
        return fingerprint in self._installed

    def check(self, layers: LayerSelection) -> None:
        """Raise :class:`FailedPrecondition` where what a request asks for cannot stand in."""
        if layers.repair is None:
            return
        installed = self._installed.get(layers.repair)
        if installed is None:
            raise FailedPrecondition(
                f"repair: the layers are to be repaired by the maps {layers.repair}, but the "
                f"engine has {', '.join(self._installed) or 'none'}"
            )
        healing = installed.healing
        if healing and not healing.serves(layers.prefill_skips, layers.decode_skips):
            raise FailedPrecondition(
                f"repair: {layers.repair} was trained for the skipped layers "
                f"{list(healing.skipped)}, but the request skips {list(layers.prefill_skips)} for "
                f"its prompt and {list(layers.decode_skips)} for what it generates; allowed: these "
                "for both, or for one of them and none for the other"
            )


async def call_workers(llm: VllmClient, method: str, *arguments: object) -> None:
    """Call a method that reads or writes maps, and raise :class:`RepairError` for its answer."""
    raise_problem(await llm.call_workers(method, _TIMEOUT_SECONDS, arguments))


def raise_problem(answers: Sequence[str | None]) -> None:
    """Raise what a worker has answered that prevents a fit or a load of maps."""
    for problem in answers:
        if problem:
            raise RepairError(problem)
