"""vLLM without Fathom, in process."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import psutil

from bench.subjects.base import EngineSettings, child_ids, new_children, own_choice_of_runner
from bench.workload import Request

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM


class PlainVllm:
    """Unmodified ``AsyncLLM`` on a checkpoint of one depth, compiled as by default, or eager."""

    def __init__(self, settings: EngineSettings, depth: int, *, eager: bool) -> None:
        self.name = f"vLLM{', eager' if eager else ''}, depth {depth}"
        self.settings = settings
        self._depth = depth
        self._eager = eager
        self._numbers = itertools.count()
        self._llm: AsyncLLM | None = None
        self._processes: list[psutil.Process] = []

    async def start(self) -> None:
        before = child_ids()
        checkpoint = await asyncio.to_thread(self.settings.model.exported, self._depth)
        await asyncio.to_thread(self._load, str(checkpoint))
        self._processes = new_children(before)

    def _load(self, checkpoint: str) -> None:
        # Sets what a future would return: vLLM keeps frames of this thread, and so futures, alive.
        from vllm.v1.engine.async_llm import AsyncLLM

        with self.environment():
            self._llm = AsyncLLM.from_engine_args(self.arguments(checkpoint))

    def environment(self) -> AbstractContextManager[None]:
        return own_choice_of_runner()

    def arguments(self, checkpoint: str) -> AsyncEngineArgs:
        from vllm import AsyncEngineArgs

        return AsyncEngineArgs(
            model=checkpoint,
            enforce_eager=self._eager,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **self.settings.vllm_arguments(),
        )

    def extra_args(self, request: Request) -> dict[str, Any] | None:
        """Return the extra arguments of a request, beside its sampling parameters."""
        return None

    async def generate(self, request: Request) -> AsyncIterator[int]:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.num_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=self.extra_args(request),
        )
        prompt = tokens_input(list(request.prompt_ids))
        async for output in self.llm.generate(prompt, params, str(next(self._numbers))):
            yield len(output.outputs[0].token_ids)

    @property
    def llm(self) -> AsyncLLM:
        assert self._llm is not None, "the engine has not been started"
        return self._llm

    def processes(self) -> list[psutil.Process]:
        return self._processes

    async def close(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown)
            del llm
            # vLLM's finalizer shuts down once more, which fails when Python itself ends.
            gc.collect()
