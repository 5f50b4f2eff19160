"""vLLM's client of one engine, with errors turned into the server's own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engine.base import (
    EngineDead,
    GenerationDelta,
    LoadInfo,
    ModelInfo,
    SamplingOptions,
    TokenScore,
)
from server.engine.fork_server import forked_engines
from server.engine.generation_defaults import GenerationDefaults
from server.engine.model_tokenizer import ModelTokenizer
from server.engine.partial_character import go_on_within_character
from server.engine.pattern_check import PatternCheck
from server.engine.sampling import sampling_params, token_scores
from server.engine.start_failure import named_failures
from server.engine.stops import Stops
from server.engine.vllm_output import check_finite, finish_reason_of, generation_delta
from server.errors import InvalidArgument, RequestFailed

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.load_logger import LoadLogger

_RPC_TIMEOUT_SECONDS = 120.0


class VllmClient:
    """vLLM's AsyncLLM: its client here, the engine in its own process.

    Every method but ``start`` and ``shutdown`` raises :class:`EngineDead` once that process has
    ended.
    """

    def __init__(self) -> None:
        self._llm: AsyncLLM | None = None
        self._load_logger: LoadLogger | None = None
        self._defaults: dict[str, Any] = {}
        self._default_stop: tuple[str, ...] = ()
        self._tokenizer: ModelTokenizer | None = None
        self._patterns: PatternCheck | None = None

    async def start(
        self, configure: Callable[[], VllmConfig], stat_loggers: Sequence[Any] = ()
    ) -> None:
        """Start the engine with what ``configure``, called in a thread, returns."""
        await self.shutdown()
        await asyncio.to_thread(self._start, configure, stat_loggers)
        config = self.model_config
        self._tokenizer = ModelTokenizer(self._require_llm().get_tokenizer(), self.model_name)
        self._patterns = PatternCheck(str(config.tokenizer), config.get_vocab_size())
        self._defaults = config.get_diff_sampling_param()
        # The server's own limit on the length of an answer comes from the request or the context.
        self._defaults.pop("max_tokens", None)
        if config.generation_config == "auto":
            more = GenerationDefaults.of_model(Path(config.model))
            self._defaults |= more.sampling
            self._default_stop = more.stop

    def _start(self, configure: Callable[[], VllmConfig], stat_loggers: Sequence[Any]) -> None:
        # Sets what a future would return: vLLM keeps frames of this thread, and so futures, alive.
        config = configure()
        from vllm.v1.engine.async_llm import AsyncLLM

        from server.engine.load_logger import LoadLogger

        def load_logger(config: Any, engine_index: int = 0) -> LoadLogger:
            self._load_logger = LoadLogger(config, engine_index)
            return self._load_logger

        # Ctrl-C reaches every process of a terminal's group. When the engine's processes, which
        # inherit the mask, are to end is the server's decision: it lets requests finish first.
        resource_tracker.ensure_running()  # when it is started, it resets the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with named_failures(), forked_engines():
                self._llm = AsyncLLM.from_vllm_config(
                    config, stat_loggers=[load_logger, *stat_loggers]
                )
                self._prepare_outputs(self._llm)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _prepare_outputs(self, llm: AsyncLLM) -> None:
        """Change what vLLM makes of requests, when they are added.

        Prompts may end within a character, and texts of scored tokens are made here: vLLM's has
        no text for rows of the embedding that are no token, and fails with all of its requests.
        Where tokens are not to end a text yet, the engine would die of an id for which there are
        no logits, which a tokenizer or a generation config may have.
        """
        processor = llm.output_processor
        num_logits = llm.model_config.get_vocab_size()
        add_request = processor.add_request

        def add(request: Any, *arguments: Any, **options: Any) -> None:
            params = request.sampling_params
            if params is not None and params.min_tokens:
                # Read for min_tokens alone, in the engine's process, to which it goes next.
                params._all_stop_token_ids = {
                    token_id for token_id in params.all_stop_token_ids if token_id < num_logits
                }
            add_request(request, *arguments, **options)
            state = processor.request_states[request.request_id]
            if state.logprobs_processor is not None:
                state.logprobs_processor.tokenizer = None
            if request.prompt_token_ids and state.detokenizer is not None:
                go_on_within_character(state.detokenizer, self.tokenizer, request.prompt_token_ids)

        processor.add_request = add  # type: ignore[method-assign]

    async def shutdown(self) -> None:
        if self._patterns is not None:
            await self._patterns.close()
        if self._llm is not None:
            llm, self._llm = self._llm, None
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it would report that the engine has died
            await asyncio.to_thread(llm.shutdown)
            del llm
            # Its finalizer shuts down once more, which would fail when Python itself ends.
            gc.collect()

    @property
    def is_alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    @property
    def process_ids(self) -> list[int]:
        """The processes that vLLM's client has started; empty if it does not know them."""
        if self._llm is None:
            return []
        resources = getattr(self._llm.engine_core, "resources", None)
        processes = getattr(getattr(resources, "engine_manager", None), "processes", ())
        return [process.pid for process in processes if process.pid is not None]

    async def ping(self) -> None:
        """Return when every worker has answered, which is between two steps."""
        await self.call_workers("check_health", timeout=None)

    @property
    def load(self) -> LoadInfo:
        return LoadInfo(0, 0) if self._load_logger is None else self._load_logger.load

    @property
    def model_config(self) -> ModelConfig:
        return self._require_llm().model_config

    @property
    def model_name(self) -> str:
        """The name that clients know the model by."""
        config = self.model_config
        name = config.served_model_name or config.model
        return name if isinstance(name, str) else name[0]

    @property
    def tokenizer(self) -> ModelTokenizer:
        if self._tokenizer is None:
            raise EngineDead("the engine is not running")
        return self._tokenizer

    def sampling_params(
        self, options: SamplingOptions, extra_args: dict[str, Any] | None = None
    ) -> SamplingParams:
        """Return vLLM's parameters; raise :class:`InvalidArgument` for what it does not take."""
        from vllm.exceptions import VLLMValidationError

        try:
            return sampling_params(options, self._defaults, extra_args)
        except (VLLMValidationError, ValueError) as error:
            raise _invalid(error) from error

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        extra_args: dict[str, Any] | None = None,
        *,
        cache_salt: str,
        depth: str,
    ) -> AsyncGenerator[GenerationDelta, None]:
        """Yield what each step adds. Closing the iterator ends the request in the engine.

        ``depth`` names the request's depth in errors.

        Raises:
            InvalidArgument: vLLM refuses the request, or its options cannot be served.
            RequestFailed: The engine has given up this request and runs on.
            NonFiniteResult: The model computes what is not a finite number.
        """
        tokenizer = self.tokenizer
        stops = Stops.of(options, tokenizer.special_tokens, self._default_stop)
        vllm_options = replace(options, stop=stops.strings, stop_token_ids=stops.token_ids)
        if options.structure is not None and self._patterns is not None:
            await self._patterns.check(options.structure)
        params = self.sampling_params(vllm_options, extra_args)
        async with self._outputs(request_id, prompt_ids, params, cache_salt) as outputs:
            async for output in outputs:
                delta = generation_delta(output, options, stops, tokenizer)
                if output.prompt_logprobs:
                    num_top = options.prompt_logprobs or 0
                    scores = token_scores(prompt_ids, output.prompt_logprobs, num_top, tokenizer)
                    delta = replace(delta, prompt_scores=scores)
                check_finite(output, (*delta.prompt_scores, *delta.scores), depth)
                yield delta

    async def prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        extra_args: dict[str, Any],
        *,
        cache_salt: str,
        depth: str,
    ) -> None:
        """Run all of ``token_ids``, uncached; raise what :meth:`generate` does."""
        params = self.sampling_params(SamplingOptions(max_tokens=1), extra_args)
        params.detokenize = False
        # A token that is found in the prefix cache is not run, and so not measured.
        params.skip_reading_prefix_cache = True
        async with self._outputs(request_id, token_ids, params, cache_salt) as outputs:
            async for output in outputs:
                finish_reason_of(output.outputs[0].finish_reason)
                check_finite(output, (), depth)

    async def prompt_scores(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str,
        depth: str,
        num_top: int = 0,
    ) -> list[TokenScore]:
        """Return the scores of all tokens but the first; raise what :meth:`generate` does."""
        params.prompt_logprobs = num_top
        # A token that is found in the prefix cache is not run, and so has no score.
        params.skip_reading_prefix_cache = True
        scores: list[TokenScore] = []
        async with self._outputs(request_id, token_ids, params, cache_salt) as outputs:
            async for output in outputs:
                finish_reason_of(output.outputs[0].finish_reason)
                if output.prompt_logprobs:
                    logprobs = output.prompt_logprobs
                    scores += token_scores(
                        token_ids, logprobs, num_top, self.tokenizer, with_greedy=True
                    )
                check_finite(output, scores, depth)
        return scores

    @contextlib.asynccontextmanager
    async def _outputs(
        self, request_id: str, token_ids: Sequence[int], params: SamplingParams, cache_salt: str
    ) -> AsyncIterator[AsyncIterator[RequestOutput]]:
        """Run a request in vLLM; leaving ends it. Errors are those of :meth:`_errors`."""
        with self._errors() as llm:
            outputs = llm.generate(_prompt(token_ids, cache_salt), params, request_id)
            async with contextlib.aclosing(outputs):
                yield outputs

    @contextlib.contextmanager
    def _errors(self) -> Iterator[AsyncLLM]:
        """Yield the running vLLM; turn exceptions into the server's errors."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = self._require_llm()
        try:
            yield llm
        except EngineDeadError as error:
            raise EngineDead("the engine's process has ended") from error
        except VLLMClientError as error:
            raise _invalid(error) from error
        except (EngineGenerateError, RequestFailed) as error:
            if llm.errored:
                raise EngineDead("the engine's process has ended") from error
            if isinstance(error, RequestFailed):
                raise
            if isinstance(error.__cause__, ValueError):
                raise _invalid(error.__cause__) from error
            reason = error.__cause__ or error
            raise RequestFailed(f"the engine could not run the request: {reason}") from error

    async def call_workers(
        self, method: str, timeout: float | None = _RPC_TIMEOUT_SECONDS, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        """Return what each worker's ``method`` returns, within ``timeout`` seconds.

        ``args`` are of plain types, which msgpack can carry.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            answers: list[Any] = await self._require_llm().collective_rpc(
                method, timeout=timeout, args=args
            )
            return answers
        except EngineDeadError as error:
            raise EngineDead("the engine's process has ended") from error

    async def use_huge_pages(self) -> None:
        """Let the engine's processes move what they have loaded into huge pages."""
        await self.call_workers("fathom_use_huge_pages")

    def _require_llm(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine is not running")
        return self._llm


def model_info(
    name: str, config: ModelConfig, architecture: str, tokenizer: ModelTokenizer
) -> ModelInfo:
    """Return what clients are told of a model."""
    return ModelInfo(
        name=name,
        architecture=architecture,
        dtype=str(config.dtype).removeprefix("torch."),
        quantization=config.quantization or "",
        num_layers=config.hf_text_config.num_hidden_layers,
        vocab_size=min(config.get_vocab_size(), tokenizer.vocab_size),
        max_context=config.max_model_len,
        max_characters_per_token=tokenizer.max_characters_per_token,
    )


def _prompt(token_ids: Sequence[int], cache_salt: str) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(token_ids), cache_salt=cache_salt)


def _invalid(error: Exception) -> InvalidArgument:
    """Report what vLLM refused; the service has checked what it knows how to name better."""
    parameter = getattr(error, "parameter", None) or "request"
    return InvalidArgument(parameter, getattr(error, "value", None), str(error))
