"""Unmodified vLLM, to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from server.engine.arguments import (
    IN_PROCESS_EXECUTOR,
    DtypeName,
    prepare_cpu_environment,
    prepare_environment,
)
from tests.server.engine.elastic.running_engine import GPU_MEMORY_SHARE


def generate_with_vllm(
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    dtype: DtypeName = "float32",
) -> list[list[int]]:
    """Return greedy tokens of plain vLLM for all of ``prompts`` at once."""
    prepare_environment()
    machine: dict[str, Any]
    if torch.cuda.is_available():
        machine = {"gpu_memory_utilization": GPU_MEMORY_SHARE}
    else:
        prepare_cpu_environment(checkpoint)
        machine = {"distributed_executor_backend": IN_PROCESS_EXECUTOR}
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        dtype=dtype,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        max_num_seqs=64,
        use_tqdm_on_load=False,
        **machine,
    )

    async def everything() -> list[list[int]]:
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            return list(await asyncio.gather(*[one(llm, *item) for item in enumerate(prompts)]))
        finally:
            llm.shutdown()

    async def one(llm: AsyncLLM, number: int, prompt: Sequence[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        async for output in llm.generate(tokens_input(list(prompt)), params, str(number)):
            last = output
        return list(last.outputs[0].token_ids)

    return asyncio.run(everything())
