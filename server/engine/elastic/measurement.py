"""Importance and quality, measured inside the engine on requests that are marked for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pruning.metrics import DensePassEstimator, DensePassSums
from pruning.quality import paired_statistics
from pruning.repair import GramEstimator, LayerMap, RepairMaps, fit_map, save_maps
from pruning.repair.gram import LayerGram
from server.engine.elastic.payload import GramProbe, ImportanceProbe, Probe, QualityProbe
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.step import ElasticStep

# Positions whose logits exist at one time; 512 of them take 256 MiB for 128k tokens in float32.
_CHUNK = 512
# [num_positions, hidden_size] -> [num_positions, vocab_size]; None on ranks without logits
ComputeLogits = Callable[[torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class MarkedRow:
    """The tokens that a step has of a marked request; ``ends``: its last one is among them."""

    probe: Probe
    num_tokens: int
    ends: bool


class LayerMeter(Protocol):
    """Takes what every layer does to the tokens of marked requests."""

    def marks(self, probe: Probe) -> bool:
        """Return whether a request with this probe is marked."""

    def begin(self, rows: Sequence[MarkedRow]) -> None:
        """Take note of a step's marked requests, whose tokens follow each other in this order."""

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the stream of the marked tokens before and after ``layer``.

        Each is [num_tokens, hidden_size].
        """


def marked_tokens(
    meter: LayerMeter, step: ElasticStep, table: RowTable
) -> torch.Tensor | slice | None:
    """Return the indices of the step's tokens to measure on, and show the meter whose they are."""
    marked = [
        (probed, int(step.first_position[row]), step.row_tokens(row))
        for row, probed in table.probed.items()
        if meter.marks(probed.probe) and step.has_row(row)
    ]
    # In the order of the batch, as a slice of all tokens has them.
    marked.sort(key=lambda each: each[2].start)
    if not marked:
        return None
    rows = [
        MarkedRow(
            probed.probe,
            tokens.stop - tokens.start,
            ends=first + tokens.stop - tokens.start == len(probed.token_ids),
        )
        for probed, first, tokens in marked
    ]
    meter.begin(rows)
    if sum(row.num_tokens for row in rows) == step.num_tokens:
        return slice(0, step.num_tokens)  # which copies nothing
    return torch.cat([torch.arange(tokens.start, tokens.stop) for _, _, tokens in marked])


class ImportanceMeter:
    """Accumulates what metrics rank by over the marked requests of any number of steps.

    The requests of a group are added up together; of each group that is
    :class:`DensePassEstimator`'s memory.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._rows: Sequence[MarkedRow] = ()
        self._groups: dict[int, DensePassEstimator] = {}

    def marks(self, probe: Probe) -> bool:
        return isinstance(probe, ImportanceProbe)

    def begin(self, rows: Sequence[MarkedRow]) -> None:
        self._rows = rows

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        start = 0
        for row in self._rows:
            assert isinstance(row.probe, ImportanceProbe)
            if row.probe.group not in self._groups:
                self._groups[row.probe.group] = DensePassEstimator(self._num_layers)
            tokens = slice(start, start + row.num_tokens)
            last = torch.tensor([row.num_tokens - 1] if row.ends else [], dtype=torch.long)
            self._groups[row.probe.group].update(layer, before[tokens], after[tokens], last)
            start = tokens.stop

    def take(self) -> dict[int, DensePassSums]:
        """Return the sums of each group, and forget them."""
        groups, self._groups = self._groups, {}
        return {group: estimator.sums() for group, estimator in sorted(groups.items())}


class GramMeter:
    """Accumulates what repair maps are fitted from, for a group of layers at a time."""

    def __init__(self, *, held_out: bool) -> None:
        self._held_out = held_out
        self._estimator = GramEstimator([])

    def reset(self, layers: Collection[int]) -> None:
        self._estimator = GramEstimator(layers)

    def marks(self, probe: Probe) -> bool:
        return isinstance(probe, GramProbe) and probe.held_out is self._held_out

    def begin(self, rows: Sequence[MarkedRow]) -> None:
        """Do nothing: to the sums it is one which request a token is of."""

    def update(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self._estimator.update(layer, before, after)

    def take(self, layer: int) -> LayerGram | None:
        """Return the sums of ``layer`` and forget them."""
        return self._estimator.take(layer)


class RepairFitter:
    """Fits repair maps from what its meters accumulate, and keeps them until they are saved."""

    def __init__(self) -> None:
        self.fit = GramMeter(held_out=False)
        self.held_out = GramMeter(held_out=True)
        self._maps: dict[int, LayerMap] = {}
        self._fitting: Future[tuple[int, LayerMap]] | None = None

    def reset(self, layers: Collection[int], *, keep_maps: bool) -> None:
        """Begin a pass over the text for a group of layers."""
        self.fit.reset(layers)
        self.held_out.reset(layers)
        if not keep_maps:
            self._maps = {}

    def begin_fit(self, layer: int, dtype: torch.dtype) -> None:
        """Begin to fit the map of one layer in a thread, so that the worker can run steps.

        The work grows with the third power of the width: a minute where that is 4,000.
        """
        fit, held_out = self.fit.take(layer), self.held_out.take(layer)
        fitting: Future[tuple[int, LayerMap]] = Future()

        def run() -> None:
            try:
                _yield_to_others()
                fitting.set_result(_fitted(layer, fit, held_out, dtype))
            except BaseException as error:
                fitting.set_exception(error)

        self._fitting = fitting
        # A worker that is to end does not wait for it.
        threading.Thread(target=run, name=f"fit of layer {layer}", daemon=True).start()

    def end_fit(self) -> bool:
        """Return whether the fit is at its end; raises what :func:`pruning.repair.fit_map` does."""
        assert self._fitting is not None, "a fit has begun"
        if not self._fitting.done():
            return False
        fitting, self._fitting = self._fitting, None
        layer, fitted = fitting.result()
        self._maps[layer] = fitted
        return True

    def save(
        self,
        path: Path,
        *,
        num_layers: int,
        model_fingerprint: str,
        text_fingerprint: str,
        num_tokens: int,
    ) -> None:
        """Write the maps, and forget them and the sums.

        Raises :class:`pruning.repair.RepairError` for maps that the type of the model cannot
        hold, and :class:`OSError` where the file cannot be written.
        """
        maps, self._maps = self._maps, {}
        self.reset([], keep_maps=False)
        save_maps(
            RepairMaps(maps, num_layers, model_fingerprint, text_fingerprint, num_tokens), path
        )


def _yield_to_others() -> None:
    """Give this thread, and those that it starts, the lowest priority."""
    if sys.platform == "linux":  # elsewhere a thread has none of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


@torch.inference_mode()
def _fitted(
    layer: int, fit: LayerGram | None, held_out: LayerGram | None, dtype: torch.dtype
) -> tuple[int, LayerMap]:
    fitted = fit_map(layer, fit, held_out)
    weight = fitted.weight.to("cpu", dtype)
    return layer, LayerMap(weight, fitted.ridge, fitted.unexplained)


class QualityMeter:
    """Compares marked requests with the same text at full depth.

    The final hidden states of the reference are kept, [num_tokens, hidden_size] for each
    window, until ``reset``; logits are made again from them, a chunk at a time.
    """

    def __init__(self, compute_logits: ComputeLogits) -> None:
        self._compute_logits = compute_logits
        self.reset()

    def reset(self) -> None:
        # window -> the states from position first_scored - 1 on, in the chunks they came in
        self._references: dict[int, list[torch.Tensor]] = {}
        # (window, selection) -> the position that comes next. A request that is recomputed after
        # a preemption passes a second time what has been counted.
        self._next: dict[tuple[int, int | None], int] = {}
        self._sums: dict[tuple[int, int], torch.Tensor] = {}

    def observe(self, step: ElasticStep, table: RowTable, hidden: torch.Tensor) -> None:
        """Take what the step computed for marked requests; ``hidden`` is after the final norm."""
        for row, probed in table.probed.items():
            if not isinstance(probed.probe, QualityProbe) or not step.has_row(row):
                continue
            tokens = step.row_tokens(row)
            first = int(step.first_position[row])
            # Position p predicts token p + 1.
            origin = probed.probe.first_scored - 1
            key = (probed.probe.window, probed.probe.selection)
            begin = max(first, self._next.get(key, origin))
            end = min(first + tokens.stop - tokens.start, len(probed.token_ids) - 1)
            if begin >= end:
                continue
            self._next[key] = end
            states = hidden[tokens.start + begin - first : tokens.start + end - first]
            if probed.probe.selection is None:
                self._references.setdefault(probed.probe.window, []).append(states.clone())
            else:
                reference = torch.cat(self._references[probed.probe.window])
                self._compare(
                    (probed.probe.window, probed.probe.selection),
                    states,
                    reference[begin - origin : end - origin],
                    torch.tensor(probed.token_ids[begin + 1 : end + 1], device=states.device),
                )

    def _compare(
        self,
        key: tuple[int, int],
        states: torch.Tensor,
        reference: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        for low in range(0, len(states), _CHUNK):
            chunk = slice(low, low + _CHUNK)
            logits = self._compute_logits(states[chunk])
            reference_logits = self._compute_logits(reference[chunk])
            if logits is None or reference_logits is None:
                return
            statistics = paired_statistics(logits, reference_logits, targets[chunk])
            previous = self._sums.get(key)
            self._sums[key] = statistics if previous is None else previous + statistics

    def sums(self) -> list[tuple[int, int, list[float]]]:
        """Return (window, selection, sums) of everything compared."""
        return [(*key, sums.tolist()) for key, sums in self._sums.items()]
