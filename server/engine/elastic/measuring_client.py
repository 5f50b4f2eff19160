"""Measures the model by marked requests, whose sums the workers keep."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from pruning.metrics import DensePassSums
from pruning.quality import Quality
from pruning.repair import check_fit_tokens, layers_at_a_time, split_windows
from server.engine.base import IsEnough, LayerSelection, ProgressCallback, never_enough
from server.engine.elastic.payload import (
    GramProbe,
    ImportanceProbe,
    Payload,
    Probe,
    QualityProbe,
)
from server.engine.elastic.repair_client import call_workers, raise_problem
from server.engine.measuring import (
    finite_quality,
    importance_parts,
    reference_sums,
)
from server.engine.pace import present_gate
from server.engine.prefix_cache import cache_salt
from server.engine.token_progress import TokenProgress
from server.engine.vllm_client import VllmClient
from server.task_group import run_together

_FIRST_FIT_POLL_SECONDS = 0.01
_FIT_POLL_SECONDS = 0.5
# Tokens whose reference states are held in the worker at one time.
_QUALITY_GROUP_TOKENS = 8192
# Measurements leave the rest of the batch to clients.
_NUM_REQUESTS = 16


class MeasuringClient:
    """Sends requests that workers measure, and takes what they have summed up.

    One measurement runs at a time: workers keep one set of sums of each kind.
    """

    def __init__(self, llm: VllmClient) -> None:
        self._llm = llm
        self._numbers = itertools.count()
        self._lock = asyncio.Lock()

    async def importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        """See :meth:`server.engine.base.Engine.measure_importance`."""
        reporter = TokenProgress(progress, windows)
        groups: list[DensePassSums] = []
        async with self._lock:
            # What a measurement that was cancelled has left.
            await self._llm.call_workers("fathom_take_importance")
            for part in importance_parts(windows):
                requests = [
                    (window, Payload(LayerSelection(), probe=ImportanceProbe(number)))
                    for number, group in enumerate(part)
                    for window in group
                ]
                await self._prefill_all(requests, reporter)
                groups += await self._take_importance()
                if await is_enough(groups):
                    reporter.finish()
                    break
        return groups

    async def _take_importance(self) -> list[DensePassSums]:
        """Return the sums of each group, which the ranks may have of different layers."""
        groups: dict[int, DensePassSums] = {}
        for answer in await self._llm.call_workers("fathom_take_importance"):
            for group, fields in answer:
                sums = DensePassSums(**fields)
                groups[group] = groups[group] + sums if group in groups else sums
        return [groups[group] for group in sorted(groups)]

    async def fit_repair(
        self,
        windows: Sequence[Sequence[int]],
        path: Path,
        fingerprints: Mapping[str, str],
        progress: ProgressCallback,
    ) -> None:
        """Fit a repair map for every layer, and write them with ``fingerprints`` to ``path``.

        Raises what :meth:`ElasticEngine.fit_repair` does.
        """
        fit, held_out = split_windows(windows)
        hidden_size = self._llm.model_config.get_hidden_size()
        num_layers, num_tokens = self._num_layers, sum(map(len, fit))
        check_fit_tokens(num_tokens, hidden_size)
        group_size = layers_at_a_time(hidden_size)
        starts = range(0, num_layers, group_size)
        reporter = TokenProgress(progress, windows, num_passes=len(starts))
        requests = [
            (window, Payload(LayerSelection(), probe=GramProbe(held_out=part is held_out)))
            for part in (fit, held_out)
            for window in part
        ]
        async with self._lock:
            for start in starts:
                group = list(range(start, min(start + group_size, num_layers)))
                await self._llm.call_workers("fathom_reset_repair", args=(group, start > 0))
                await self._prefill_all(requests, reporter)
                for layer in group:
                    await self._fit_layer(layer)
            provenance = {**fingerprints, "num_layers": num_layers, "num_tokens": num_tokens}
            await call_workers(self._llm, "fathom_save_repair", str(path), provenance)

    async def _fit_layer(self, layer: int) -> None:
        """Fit the map of a layer while the engine serves."""
        await self._llm.call_workers("fathom_begin_fit", args=(layer,))
        delay = _FIRST_FIT_POLL_SECONDS
        while None in (answers := await self._llm.call_workers("fathom_end_fit")):
            await asyncio.sleep(delay)
            delay = min(2 * delay, _FIT_POLL_SECONDS)
        raise_problem(answers)

    async def quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        """See :meth:`server.engine.base.Engine.measure_quality`."""
        dense = LayerSelection()
        # The reference of the others is the dense model itself.
        pruned = list(dict.fromkeys(s for s in selections if s != dense)) or [dense]
        sums: list[list[list[float]]] = [[] for _ in pruned]
        reporter = TokenProgress(progress, windows, num_passes=len(pruned) + 1)
        group_size = max(1, _QUALITY_GROUP_TOKENS // max(map(len, windows)))
        async with self._lock:
            for start in range(0, len(windows), group_size):
                group = list(enumerate(windows[start : start + group_size]))
                await self._llm.call_workers("fathom_reset_quality")
                for index, layers in [(None, dense), *enumerate(pruned)]:
                    payloads = [
                        (window, _quality_payload(number, index, len(window), layers))
                        for number, window in group
                    ]
                    await self._prefill_all(payloads, reporter)
                for answer in await self._llm.call_workers("fathom_quality_sums"):
                    for _, selection, window_sums in answer:
                        sums[selection].append(window_sums)
            await self._llm.call_workers("fathom_reset_quality")
        by_layers = dict(zip(pruned, sums, strict=True))
        by_layers[dense] = [reference_sums(window_sums) for window_sums in sums[0]]
        return [
            finite_quality(by_layers[layers], layers.depth_text(self._num_layers))
            for layers in selections
        ]

    @property
    def _num_layers(self) -> int:
        return int(self._llm.model_config.hf_text_config.num_hidden_layers)

    async def _prefill_all(
        self, requests: Sequence[tuple[Sequence[int], Payload]], progress: TokenProgress
    ) -> None:
        gate = present_gate()
        slots = asyncio.Semaphore(_NUM_REQUESTS if gate is None else 1)

        async def prefill(token_ids: Sequence[int], payload: Payload) -> None:
            async with slots:
                if gate is not None:
                    await gate()
                await self._llm.prefill(
                    f"measure-{next(self._numbers)}",
                    token_ids,
                    payload.to_extra_args(),
                    cache_salt=cache_salt(payload.layers, None),
                    depth=payload.layers.depth_text(self._num_layers),
                )
                progress.advance(len(token_ids))

        await run_together(prefill(*request) for request in requests)


def _quality_payload(
    window: int, selection: int | None, length: int, layers: LayerSelection
) -> Payload:
    half = length // 2
    probe: Probe = QualityProbe(window, selection, first_scored=half)
    return Payload(layers, num_context=half, probe=probe)
