"""The elastic engine: vLLM's AsyncLLM with a model that runs any depth."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from pydantic import ValidationError

from pruning.importance import BlockInfluence, block_influence, merge_sums
from pruning.quality import Quality, quality_of_windows
from server.engine.base import (
    EngineDead,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    LayerSelection,
    LoadInfo,
    ModelInfo,
    ProgressCallback,
    SamplingOptions,
    TokenScore,
)
from server.engine.elastic.compatibility import check_vllm
from server.engine.elastic.engine_arguments import (
    ElasticConfig,
    check_kv_cache,
    prepare_environment,
    refusal,
    vllm_arguments,
)
from server.engine.elastic.payload import (
    ImportanceProbe,
    Payload,
    Probe,
    QualityProbe,
    cache_salt,
)
from server.engine.elastic.sampling import sampling_params, token_scores
from server.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.elastic.load_logger import LoadLogger

logger = logging.getLogger(__name__)

_RPC_TIMEOUT_SECONDS = 120.0
# Tokens whose reference states are held in the worker at one time.
_QUALITY_GROUP_TOKENS = 8192
# Measurements leave the rest of the batch to clients.
_MEASURING_REQUESTS = 16


class ElasticEngine:
    """Runs every depth of one model in one vLLM engine; see :class:`server.engine.base.Engine`."""

    name = "elastic"

    def __init__(self, config: ElasticConfig) -> None:
        self._config = config
        self._llm: AsyncLLM | None = None
        self._load_logger: LoadLogger | None = None
        self._model: ModelInfo | None = None
        self._defaults: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._measuring = asyncio.Lock()

    async def start(self) -> None:
        """Load the model, or load it again after its process has ended.

        Raises:
            IncompatibleVllm: The installed vLLM lacks what the engine needs.
            UnsupportedArchitecture: The model cannot run at several depths.
            InvalidArgument: An entry of ``engine_args`` is none that vLLM takes.
        """
        await self.shutdown()
        await asyncio.to_thread(self._start_llm)
        config = self._require_llm().model_config
        self._defaults = config.get_diff_sampling_param()
        # The server's own limit on the length of an answer comes from the request or the context.
        self._defaults.pop("max_tokens", None)
        self._model = ModelInfo(
            name=self._config.name,
            architecture=_architecture(config.architectures),
            dtype=str(config.dtype).removeprefix("torch."),
            quantization=config.quantization or "",
            num_layers=config.hf_text_config.num_hidden_layers,
            vocab_size=config.get_vocab_size(),
            max_context=config.max_model_len,
            max_characters_per_token=self._tokenizer.max_chars_per_token,
        )

    def _start_llm(self) -> None:
        # Sets what a future would return: vLLM keeps frames of this thread, and so futures, alive.
        prepare_environment()
        check_vllm()
        from vllm.v1.engine.async_llm import AsyncLLM

        from server.engine.elastic.load_logger import LoadLogger
        from server.engine.elastic.plugin import register

        register()

        def load_logger(config: Any, engine_index: int = 0) -> LoadLogger:
            self._load_logger = LoadLogger(config, engine_index)
            return self._load_logger

        # Ctrl-C reaches every process of a terminal's group. When the engine's processes, which
        # inherit the mask, are to end is the server's decision: it lets requests finish first.
        resource_tracker.ensure_running()  # when it is started, it resets the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            vllm_config = vllm_arguments(self._config).create_engine_config()
            check_kv_cache(vllm_config, self._config.kv_cache_gib)
            self._llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[load_logger])
        except ValidationError as error:
            raise refusal(error, self._config) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    async def shutdown(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it would report that the engine has died
            await asyncio.to_thread(llm.shutdown)
            del llm
            # In its finalizer it shuts down once more, which fails when Python itself ends.
            gc.collect()

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "the engine has not been started"
        return self._model

    @property
    def is_alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def load(self) -> LoadInfo:
        if self._load_logger is None:
            return LoadInfo(0, 0)
        return self._load_logger.load

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise FailedPrecondition(
                f"model {self.model.name} has no chat template; send a prompt or token ids"
            )
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            roles = [message.get("role") for message in messages]
            raise InvalidArgument(
                "chat.messages", roles, f"what the model's chat template takes ({error})"
            ) from error
        return list(ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([token_id]) for token_id in token_ids]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        params = self._sampling_params(request.sampling, Payload(request.layers))
        num_top = request.sampling.logprobs or 0
        async with contextlib.aclosing(
            self._run(request.request_id, request.prompt_ids, params)
        ) as outputs:
            async for output in outputs:
                yield _delta(output, num_top)

    async def score(
        self, request_id: str, token_ids: Sequence[int], num_context: int, layers: LayerSelection
    ) -> list[TokenScore]:
        params = self._sampling_params(
            SamplingOptions(max_tokens=1, temperature=0.0), Payload(layers, num_context)
        )
        params.prompt_logprobs = 0
        scores: list[TokenScore] = []
        async with contextlib.aclosing(self._run(request_id, token_ids, params)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs:
                    scores.extend(token_scores(token_ids, output.prompt_logprobs, 0))
        return scores[num_context - 1 :]

    async def measure_importance(
        self, windows: Sequence[Sequence[int]], progress: ProgressCallback
    ) -> BlockInfluence:
        async with self._measuring:
            await self._call_workers("fathom_reset_importance")
            payload = Payload(LayerSelection(), probe=ImportanceProbe())
            await self._prefill_all(
                [(window, payload) for window in windows], _Progress(progress, windows)
            )
            sums: list[list[float]] | None = None
            for answer in await self._call_workers("fathom_importance_sums"):
                if answer is not None:
                    sums = answer if sums is None else merge_sums(sums, answer)
        assert sums is not None
        return block_influence(sums)

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        sums: list[list[list[float]]] = [[] for _ in selections]
        reporter = _Progress(progress, windows, num_passes=len(selections) + 1)
        group_size = max(1, _QUALITY_GROUP_TOKENS // max(map(len, windows)))
        async with self._measuring:
            for start in range(0, len(windows), group_size):
                group = list(enumerate(windows[start : start + group_size]))
                await self._call_workers("fathom_reset_quality")
                for index, layers in [(None, LayerSelection()), *enumerate(selections)]:
                    payloads = [
                        (window, _quality_payload(number, index, len(window), layers))
                        for number, window in group
                    ]
                    await self._prefill_all(payloads, reporter)
                for answer in await self._call_workers("fathom_quality_sums"):
                    for _, selection, window_sums in answer:
                        sums[selection].append(window_sums)
            await self._call_workers("fathom_reset_quality")
        return [quality_of_windows(window_sums) for window_sums in sums]

    async def _prefill_all(
        self, requests: Sequence[tuple[Sequence[int], Payload]], progress: _Progress
    ) -> None:
        slots = asyncio.Semaphore(_MEASURING_REQUESTS)

        async def prefill(token_ids: Sequence[int], payload: Payload) -> None:
            async with slots:
                params = self._sampling_params(SamplingOptions(max_tokens=1), payload)
                params.detokenize = False
                # A hit in the prefix cache would be a token that is not measured.
                params.skip_reading_prefix_cache = True
                async for _ in self._run(f"measure-{next(self._numbers)}", token_ids, params):
                    pass
                progress.advance(len(token_ids))

        try:
            async with asyncio.TaskGroup() as group:
                for token_ids, payload in requests:
                    group.create_task(prefill(token_ids, payload))
        except* Exception as failures:
            raise _first(failures) from None

    def _sampling_params(self, options: SamplingOptions, payload: Payload) -> SamplingParams:
        from vllm.exceptions import VLLMValidationError

        try:
            return sampling_params(options, payload, self._defaults)
        except (VLLMValidationError, ValueError) as error:
            raise _invalid(error) from error

    async def _run(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = self._require_llm()
        layers = Payload.from_extra_args(params.extra_args).layers
        prompt = tokens_input(list(prompt_ids), cache_salt=cache_salt(layers, request_id))
        try:
            async with contextlib.aclosing(llm.generate(prompt, params, request_id)) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise EngineDead("the engine's process has ended") from error
        except VLLMClientError as error:
            raise _invalid(error) from error
        except EngineGenerateError as error:
            if llm.errored:
                raise EngineDead("the engine's process has ended") from error
            if isinstance(error.__cause__, ValueError):
                raise _invalid(error.__cause__) from error
            raise

    async def _call_workers(self, method: str) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            answers: list[Any] = await self._require_llm().collective_rpc(
                method, timeout=_RPC_TIMEOUT_SECONDS
            )
            return answers
        except EngineDeadError as error:
            raise EngineDead("the engine's process has ended") from error

    def _require_llm(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine is not running")
        return self._llm

    @property
    def _tokenizer(self) -> Any:
        return self._require_llm().get_tokenizer()


class _Progress:
    """Counts measured tokens for a callback."""

    def __init__(
        self, callback: ProgressCallback, windows: Sequence[Sequence[int]], num_passes: int = 1
    ) -> None:
        self._callback = callback
        self._total = num_passes * sum(map(len, windows))
        self._done = 0

    def advance(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._callback(self._done, self._total)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    failure: Exception | BaseExceptionGroup[Exception] = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _quality_payload(
    window: int, selection: int | None, length: int, layers: LayerSelection
) -> Payload:
    half = length // 2
    probe: Probe = QualityProbe(window, selection, first_scored=half)
    return Payload(layers, num_context=half, probe=probe)


def _delta(output: RequestOutput, num_top: int) -> GenerationDelta:
    completion = output.outputs[0]
    metrics = output.metrics
    queue_seconds = 0.0
    if metrics is not None and metrics.scheduled_ts and metrics.queued_ts:
        queue_seconds = max(0.0, metrics.scheduled_ts - metrics.queued_ts)
    token_ids = tuple(completion.token_ids)
    return GenerationDelta(
        text=completion.text,
        token_ids=token_ids,
        scores=token_scores(token_ids, completion.logprobs, num_top),
        num_cached_tokens=output.num_cached_tokens or 0,
        queue_seconds=queue_seconds,
        finish_reason=_finish_reason(completion.finish_reason),
        stopped_by=completion.stop_reason,
    )


def _finish_reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None:
            return None
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
        case _:
            raise EngineDead(f"the engine ended the request: {reason}")


def _architecture(architectures: Sequence[str]) -> str:
    return architectures[0].removeprefix("FathomElastic")


def _invalid(error: Exception) -> InvalidArgument:
    """Report what vLLM refused; the service has checked what it knows how to name better."""
    parameter = getattr(error, "parameter", None) or "request"
    return InvalidArgument(parameter, getattr(error, "value", None), str(error))
