"""Follows which request sits in which row of vLLM's batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from server.engine.elastic.payload import Payload
from server.engine.elastic.row_table import RowTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM makes the tracker and the model apart from each other, but gives both the same
# configuration object, by which they find their common table. A process loads one model, seldom
# more, so a search through a list will do.
_tables: list[tuple[VllmConfig, RowTable]] = []


def row_table(config: VllmConfig) -> RowTable:
    """Return the table of the engine with this configuration object, the same one every time."""
    for known, table in _tables:
        if known is config:
            return table
    num_layers = config.model_config.hf_text_config.num_hidden_layers
    table = RowTable(config.scheduler_config.max_num_seqs, num_layers)
    _tables.append((config, table))
    return table


class RowTracker(LogitsProcessor):
    """Keeps the row table current, and leaves logits alone.

    vLLM calls ``update_state`` before every forward pass, with the rows that changed.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._table = row_table(vllm_config)
        self._table.is_tracked = True

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._table.clear(row)
        for row, params, prompt_ids, _ in batch_update.added:
            self._table.put(row, Payload.from_extra_args(params.extra_args), prompt_ids)
        for first, second, direction in batch_update.moved:
            if direction is MoveDirectionality.SWAP:
                self._table.swap(first, second)
            else:
                self._table.move(first, second)
