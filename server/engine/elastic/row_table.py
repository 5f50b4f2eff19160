"""The layers that the request in each row of the batch runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine.elastic.payload import Payload, Probe


@dataclass(frozen=True, slots=True)
class ProbedRequest:
    """A request that something is measured on, with its tokens."""

    probe: Probe
    token_ids: tuple[int, ...]


class RowTable:
    """The layer choices of the batch's rows; a row without a request runs every layer.

    ``prefill_active`` and ``decode_active``: [num_rows, num_layers] of bool, the layers that run
    prompt tokens and generated ones. ``num_context``: [num_rows], how many of the row's tokens
    are prompt. ``is_split``: [num_rows], whether prompt and generated tokens run different
    layers. ``repair``: [num_rows], the number of the file whose stand-ins do the work of skipped
    layers; 0: none do. ``has_stand_in``: [1 + number of files, num_layers], the layers that each
    has one for. ``is_tracked``: whether a row tracker keeps this table.
    """

    def __init__(self, num_rows: int, num_layers: int) -> None:
        self.prefill_active: npt.NDArray[np.bool_] = np.ones((num_rows, num_layers), np.bool_)
        self.decode_active: npt.NDArray[np.bool_] = np.ones((num_rows, num_layers), np.bool_)
        self.num_context: npt.NDArray[np.int64] = np.zeros(num_rows, np.int64)
        self.is_split: npt.NDArray[np.bool_] = np.zeros(num_rows, np.bool_)
        self.repair: npt.NDArray[np.int64] = np.zeros(num_rows, np.int64)
        self.has_stand_in: npt.NDArray[np.bool_] = np.zeros((1, num_layers), np.bool_)
        self._numbers: dict[str, int] = {}
        self.probed: dict[int, ProbedRequest] = {}
        self.is_tracked = False

    def add_repair(self, fingerprint: str, layers: Collection[int]) -> int:
        """Return the number of the stand-ins with this fingerprint, which are of ``layers``."""
        number = self._numbers.setdefault(fingerprint, len(self._numbers) + 1)
        if number == len(self.has_stand_in):
            self.has_stand_in = np.vstack([self.has_stand_in, np.zeros_like(self.has_stand_in[:1])])
        self.has_stand_in[number] = False
        self.has_stand_in[number, list(layers)] = True
        return number

    def put(self, row: int, payload: Payload, prompt_ids: Sequence[int] | None) -> None:
        """Place a request; ``prompt_ids`` excludes what was generated before a preemption."""
        self.clear(row)
        self.prefill_active[row, list(payload.layers.prefill_skips)] = False
        self.decode_active[row, list(payload.layers.decode_skips)] = False
        self.is_split[row] = payload.layers.prefill_skips != payload.layers.decode_skips
        if payload.layers.repair is not None:
            self.repair[row] = self._numbers[payload.layers.repair]
        num_prompt = len(prompt_ids or ())
        self.num_context[row] = num_prompt if payload.num_context is None else payload.num_context
        if payload.probe is not None:
            self.probed[row] = ProbedRequest(payload.probe, tuple(prompt_ids or ()))

    def clear(self, row: int) -> None:
        self.prefill_active[row] = True
        self.decode_active[row] = True
        self.num_context[row] = 0
        self.is_split[row] = False
        self.repair[row] = 0
        self.probed.pop(row, None)

    def move(self, source: int, target: int) -> None:
        for column in self._columns():
            column[target] = column[source]
        self.probed.pop(target, None)
        if source in self.probed:
            self.probed[target] = self.probed.pop(source)

    def swap(self, first: int, second: int) -> None:
        for column in self._columns():
            column[[first, second]] = column[[second, first]]
        probes = self.probed.pop(first, None), self.probed.pop(second, None)
        for row, probed in zip((second, first), probes, strict=True):
            if probed is not None:
                self.probed[row] = probed

    def _columns(self) -> tuple[npt.NDArray[np.bool_] | npt.NDArray[np.int64], ...]:
        return (
            self.prefill_active,
            self.decode_active,
            self.num_context,
            self.is_split,
            self.repair,
        )
