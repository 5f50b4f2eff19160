"""transformers without a serving engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from bench.load import Load, Timeline
from bench.subjects.base import EngineSettings
from bench.workload import Request


class TransformersGenerate:
    """``generate`` of transformers: greedy, all streams in one batch, no streaming."""

    name = "transformers generate"

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._model: Any = None

    async def start(self) -> None:
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        import os

        import torch
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        model = auto.from_pretrained(
            self._settings.model.directory, dtype=getattr(torch, self._settings.dtype)
        )
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    async def closed_loop(self, streams: Sequence[Sequence[Request]]) -> Load:
        """Run the streams' requests as one batch after another."""
        return await asyncio.to_thread(self._run, streams)

    def _run(self, streams: Sequence[Sequence[Request]]) -> Load:
        begin = time.perf_counter()
        timelines = []
        for batch in zip(*streams, strict=True):
            due = time.perf_counter()
            self._generate(batch)
            done = time.perf_counter()
            timelines += [Timeline(due, [(done, request.num_tokens)]) for request in batch]
        return Load(tuple(timelines), begin, time.perf_counter())

    def _generate(self, batch: Sequence[Request]) -> None:
        import torch

        longest = max(len(request.prompt_ids) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, longest - len(request.prompt_ids) :] = 1
        num_tokens = max(request.num_tokens for request in batch)
        self._model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )

    async def close(self) -> None:
        self._model = None
