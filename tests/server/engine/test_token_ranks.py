"""Ranks of tokens, counted without a compiler."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import logprobs as vllm_logprobs

from server.engine.elastic.plugin import register
from server.engine.token_ranks import ranks


def test_they_are_those_of_vllm() -> None:
    compiled: Any = vllm_logprobs.batched_count_greater_than
    plain = compiled._torchdynamo_orig_callable
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 2, 64, 65, 200):
        rows = torch.randn(num_rows, 97, generator=generator)
        values = rows[torch.arange(num_rows), torch.arange(num_rows) % 97].unsqueeze(-1)
        assert torch.equal(ranks(rows, values), plain(rows, values))


def test_every_process_of_an_engine_on_cpu_counts_so() -> None:
    register()
    uncompiled = vars(sampler)["batched_count_greater_than"] is ranks
    assert uncompiled == current_platform.is_cpu()
