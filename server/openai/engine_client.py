"""The engine as vLLM's serving classes see it: Fathom's service."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import merge_async_iterators

from server.errors import FathomError
from server.openai.call import PROMPT, Call, current
from server.openai.choice import Choice
from server.serving.inference import Inference
from server.task_group import run_together


class InferenceClient(EngineClient):
    """An EngineClient that generates by :class:`Inference`, and does nothing else.

    vLLM's serving classes see no state of an engine: :class:`Inference` refuses what cannot be
    served, and no error of vLLM's engine gets here. The renderer is this client's own, since that
    of vLLM's engine is shut down with the engine.
    """

    is_running = True
    is_stopped = False
    errored = False
    dead_error = RuntimeError("the engine's death is told of by Fathom's service")
    # Only beam search uses it, which is not offered.
    input_processor: Any = None

    def __init__(self, inference: Inference, vllm_config: VllmConfig) -> None:
        self._inference = inference
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of all choices of one prompt of the call.

        What to generate is in the call; vLLM's parameters of it are not looked at, so that nothing
        gets from a client to the engine that Fathom does not know.
        """
        call = current()
        choices = [Choice(call, prompt[PROMPT], i) for i in range(call.num_choices)]
        if not call.is_stream:
            yield await self._whole(call, choices)
            return
        streams = [self._stream(call, choice) for choice in choices]
        async with aclosing(merge_async_iterators(*streams)) as outputs:
            async for _number, output in outputs:
                yield output

    async def _whole(self, call: Call, choices: list[Choice]) -> RequestOutput:
        try:
            await run_together(map(self._run_whole, choices))
        except FathomError as error:
            raise call.refuse(error) from None
        whole, *others = [choice.whole_output() for choice in choices]
        for other in others:
            whole.outputs += other.outputs
        return whole

    async def _run_whole(self, choice: Choice) -> None:
        # Nothing reaches the client before the end, so the request may run again.
        async with self._inference.generate(choice.request, may_repeat=True) as events:
            async for event in events:
                choice.add(event)

    async def _stream(self, call: Call, choice: Choice) -> AsyncGenerator[RequestOutput, None]:
        try:
            async with self._inference.generate(choice.request) as events:
                async for event in events:
                    output = choice.add(event)
                    if output is not None:
                        yield output
        except FathomError as error:
            # An engine's death ends all choices. One error ends the call, and the others are
            # not raised: nobody would look at them.
            if call.error is None:
                raise call.refuse(error) from error

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()

    # What is abstract in EngineClient, and never called here

    async def abort(self, request_id: Any) -> None:
        """Do nothing: who stops to iterate over :meth:`generate` frees the engine."""

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        """Do nothing: Fathom has metrics of its own."""

    async def check_health(self) -> None:
        """Do nothing: Fathom watches its engine."""

    async def _not_offered(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    encode: Any = _not_offered
    notify_kv_transfer_request_rejected: Any = _not_offered
    start_profile: Any = _not_offered
    stop_profile: Any = _not_offered
    reset_mm_cache: Any = _not_offered
    reset_encoder_cache: Any = _not_offered
    reset_prefix_cache: Any = _not_offered
    sleep: Any = _not_offered
    wake_up: Any = _not_offered
    is_sleeping: Any = _not_offered
    release_kv_cache_memory: Any = _not_offered
    add_lora: Any = _not_offered
    pause_generation: Any = _not_offered
    resume_generation: Any = _not_offered
    is_paused: Any = _not_offered
