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

# vLLM makes the tracker and the model apart from each other, both from the same configuration;
# it is what they find each other by. A process loads one model, seldom more. The configuration
# is kept, so that its identity is not given to another.
_tables: dict[int, tuple[VllmConfig, RowTable]] = {}


def row_table(config: VllmConfig) -> RowTable:
    """Return the table of the engine with this configuration, the same one every time."""
    if id(config) not in _tables:
        table = RowTable(
            config.scheduler_config.max_num_seqs,
            config.model_config.hf_text_config.num_hidden_layers,
        )
        _tables[id(config)] = config, table
    return _tables[id(config)][1]


class RowTracker(LogitsProcessor):
    """Keeps the row table current; logits it leaves alone.

    vLLM calls ``update_state`` before every forward pass, with the rows that changed.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._table = row_table(vllm_config)

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
