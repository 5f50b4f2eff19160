"""The dedicated engine: an unmodified vLLM engine for each level."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.checkpoint import read_config
from pruning.fingerprint import model_fingerprint
from pruning.metrics import DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality
from server.engine.arguments import (
    EngineConfig,
    base_arguments,
    check_engine_args,
    cpu_arguments,
    cpu_kv_cache_bytes,
    prepare_environment,
    refusal,
)
from server.engine.base import (
    CacheNamespace,
    GenerationDelta,
    GenerationRequest,
    IsEnough,
    LayerSelection,
    LoadInfo,
    ModelInfo,
    ProgressCallback,
    SamplingOptions,
    TokenScore,
    never_enough,
)
from server.engine.dedicated.checkpoints import CheckpointStore
from server.engine.dedicated.importance import measure_in_process
from server.engine.dedicated.level_engine import LevelEngine
from server.engine.dedicated.quality import WindowStatistics, window_statistics
from server.engine.dedicated.resources import Resources, cpu_resources, divide_memory
from server.engine.measuring import check_windows, finite_quality
from server.engine.model_tokenizer import ModelTokenizer
from server.engine.prefix_cache import cache_salt
from server.engine.token_progress import TokenProgress
from server.engine.vllm_client import model_info
from server.errors import FailedPrecondition, FathomError, Unavailable
from server.file_hashes import FileHashes
from server.task_group import run_together

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from server.engine.dedicated.vllm_metrics import Registry

logger = logging.getLogger(__name__)

_DENSE = LayerSelection()


@dataclass(frozen=True, slots=True)
class DedicatedConfig(EngineConfig):
    """Configuration of the dedicated engine.

    ``memory_shares`` maps a level to its engine's share of the memory. Checkpoints are kept in
    ``state_dir``. An engine that does not answer for ``timeout_seconds`` is started again, and one
    that does nothing at all after ``stall_seconds``; 0: never. ``ranked_model`` is the checkpoint
    whose layers are ranked, if not ``model``: transformers cannot load every quantized one.
    """

    memory_shares: Mapping[str, float] = field(default_factory=dict)
    state_dir: Path = Path()
    timeout_seconds: float = 0.0
    stall_seconds: float = 0.0
    ranked_model: Path | None = None


class DedicatedEngine:
    """Runs the depths that it was prepared for; see :class:`server.engine.base.Engine`.

    An engine whose process has ended is started again with back-off. Meanwhile only requests of
    its depth are refused, with :class:`Unavailable`. The dedicated engine is alive while any of
    its engines is.
    """

    name = "dedicated"
    serves_any_depth = False
    restarts_itself = True

    def __init__(self, config: DedicatedConfig) -> None:
        self._config = config
        self.on_restart: Callable[[], None] = lambda: None
        self._engines: dict[LayerSelection, LevelEngine] = {}
        self._retirements: set[asyncio.Task[None]] = set()
        self._model: ModelInfo | None = None
        self._tokenizer: ModelTokenizer | None = None
        self._dtype = ""
        self._total_kv_cache_bytes: int | None = None
        # Held while level engines are added, and while one of them starts.
        self._preparing, self._starting = asyncio.Lock(), asyncio.Lock()
        self._checkpoints: CheckpointStore | None = None
        self._metrics: Any = None
        self._vllm_config: VllmConfig | None = None

    async def start(self) -> None:
        """Read the model's configuration and tokenizer; :meth:`prepare` starts the engines.

        Called again, it waits until an engine runs: each engine restarts itself.

        Raises :class:`InvalidArgument` for a setting that vLLM does not take.
        """
        if self._model is not None:
            while not self.is_alive:
                await asyncio.sleep(0.1)
            return
        config, tokenizer = await asyncio.to_thread(self._read_model)
        self._tokenizer = ModelTokenizer(tokenizer, self._config.name)
        self._dtype = str(config.dtype).removeprefix("torch.")
        self._model = model_info(
            self._config.name,
            config,
            config.architectures[0],
            self._tokenizer,
        )
        self._checkpoints = CheckpointStore(
            self._config.state_dir,
            self._config.model,
            self._config.name,
            await asyncio.to_thread(
                model_fingerprint, self._config.model, FileHashes(self._config.state_dir)
            ),
            with_code=self._config.trust_remote_code,
        )
        self._publish_metrics()

    async def prepare(
        self, plan: Plan, levels: Mapping[str, LayerSelection], progress: ProgressCallback
    ) -> None:
        async with self._preparing:
            started: dict[LayerSelection, LevelEngine] = {}
            new = [
                layers for layers in dict.fromkeys(levels.values()) if layers not in self._engines
            ]
            shares = self._shares(levels)
            try:
                for layers in new:
                    progress(len(started), len(new))
                    resources = shares[layers], len(shares)
                    started[layers] = await self._start_engine(plan, layers, *resources)
            except BaseException:
                await asyncio.gather(*[engine.shutdown() for engine in started.values()])
                raise
            self._engines = {**self._engines, **started}
            progress(len(new), len(new))

    def release_others(self, selections: Iterable[LayerSelection]) -> None:
        kept = set(selections)
        released = [engine for layers, engine in self._engines.items() if layers not in kept]
        self._engines = {k: engine for k, engine in self._engines.items() if k in kept}
        for engine in released:
            task = asyncio.create_task(self._retire(engine))
            self._retirements.add(task)
            task.add_done_callback(self._retirements.discard)

    def can_run(self, layers: LayerSelection) -> bool:
        engine = self._engines.get(layers)
        return engine is not None and engine.is_alive

    async def shutdown(self) -> None:
        async with self._preparing:  # prepare() ends the engines that it has started if it fails
            for task in self._retirements:
                task.cancel()
            await asyncio.gather(*self._retirements, return_exceptions=True)
            engines, self._engines = self._engines, {}
            await asyncio.gather(*[engine.shutdown() for engine in engines.values()])
        if self._metrics is not None:
            self._metrics.withdraw()
            self._metrics = None

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "the engine has not been started"
        return self._model

    @property
    def vllm_config(self) -> VllmConfig:
        """The configuration of the model as a whole: each level's engine has one of its own."""
        assert self._vllm_config is not None, "the engine has not been started"
        return self._vllm_config

    @property
    def is_alive(self) -> bool:
        return any(engine.is_alive for engine in self._engines.values())

    @property
    def process_ids(self) -> Sequence[int]:
        engines = self._engines.values()
        return [process_id for engine in engines for process_id in engine.llm.process_ids]

    async def ping(self) -> None:
        await run_together(m.llm.ping() for m in self._engines.values() if m.is_alive)

    def load(self) -> LoadInfo:
        loads = [engine.llm.load for engine in self._engines.values()]
        return LoadInfo(
            sum(load.num_running for load in loads), sum(load.num_waiting for load in loads)
        )

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return self._require_tokenizer().tokenize(text, special_tokens=special_tokens)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._require_tokenizer().tokenize_chat(messages)

    def detokenize_prompt(self, token_ids: Sequence[int]) -> str:
        return self._require_tokenizer().detokenize_prompt(token_ids)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._require_tokenizer().token_texts(token_ids)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        with self._engine_for(request.layers).in_use() as llm:
            deltas = llm.generate(
                request.request_id,
                request.prompt_ids,
                request.sampling,
                cache_salt=cache_salt(request.layers, request.cache_namespace, request.cache_salt),
                depth=request.layers.depth_text(self.model.num_layers),
            )
            async with aclosing(deltas):
                async for delta in deltas:
                    yield delta

    async def score(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_context: int,
        layers: LayerSelection,
        cache_namespace: CacheNamespace | None = None,
    ) -> list[TokenScore]:
        with self._engine_for(layers).in_use() as llm:
            params = llm.sampling_params(SamplingOptions(max_tokens=1, temperature=0.0))
            scores = await llm.prompt_scores(
                request_id,
                token_ids,
                params,
                cache_salt=cache_salt(layers, cache_namespace),
                depth=layers.depth_text(self.model.num_layers),
            )
        return scores[num_context - 1 :]

    async def measure_importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        check_windows(windows, self.model)
        return await measure_in_process(
            self._config.ranked_model or self._config.model,
            windows,
            progress,
            is_enough,
            dtype=self._dtype,
            trust_remote_code=self._config.trust_remote_code,
        )

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        """Measure as the protocol says, without divergence.

        There is no agreement either where no level is dense.
        """
        check_windows(windows, self.model)
        has_dense = _DENSE in self._engines
        order = list(dict.fromkeys([_DENSE, *selections] if has_dense else selections))
        reporter = TokenProgress(progress, windows, num_passes=len(order))
        found: dict[LayerSelection, list[WindowStatistics]] = {}
        for layers in order:
            with self._engine_for(layers).in_use() as llm:
                depth = layers.depth_text(self.model.num_layers)
                found[layers] = await window_statistics(llm, windows, depth, reporter)
        references = found[_DENSE] if has_dense else [None] * len(windows)
        return [
            finite_quality(
                [
                    window.sums(reference)
                    for window, reference in zip(found[layers], references, strict=True)
                ],
                layers.depth_text(self.model.num_layers),
            )
            for layers in selections
        ]

    def _read_model(self) -> tuple[ModelConfig, Any]:
        prepare_environment()
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.tokenizers.registry import cached_tokenizer_from_config

        config = self._config
        check_engine_args(config.engine_args)
        arguments = base_arguments(config)
        if current_platform.is_cpu():
            self._total_kv_cache_bytes = cpu_kv_cache_bytes(config.kv_cache_gib)
            quantized = "quantization_config" in read_config(config.model)
            arguments |= cpu_arguments(config, quantized=quantized)
        try:
            engine_args = AsyncEngineArgs(**{**arguments, **config.engine_args})
            self._vllm_config = engine_args.create_engine_config()
        except Exception as error:  # its checks raise what they like
            raise refusal(error, config) from error
        model_config = self._vllm_config.model_config
        return model_config, cached_tokenizer_from_config(model_config)

    def _shares(self, levels: Mapping[str, LayerSelection]) -> dict[LayerSelection, float]:
        """Return each engine's share of the memory: levels of one depth share an engine."""
        shares: dict[LayerSelection, float] = {}
        for name, share in divide_memory(list(levels), self._config.memory_shares).items():
            shares[levels[name]] = shares.get(levels[name], 0.0) + share
        return shares

    async def _start_engine(
        self, plan: Plan, layers: LayerSelection, share: float, num_levels: int
    ) -> LevelEngine:
        depth = plan.num_layers - len(layers.decode_skips)
        assert self._checkpoints is not None, "the engine has not been started"
        checkpoint = await self._checkpoints.checkpoint(plan, layers.decode_skips)
        resources = Resources(share)
        if self._total_kv_cache_bytes is not None:
            num_cores = len(os.sched_getaffinity(0))
            resources = cpu_resources(
                checkpoint, share, self._total_kv_cache_bytes, num_cores, num_levels
            )
        engine = LevelEngine(
            self._config,
            checkpoint,
            depth,
            resources,
            self._starting,
            lambda: self.on_restart(),
            self._config.timeout_seconds,
            self._config.stall_seconds,
        )
        start = asyncio.create_task(engine.start())
        try:
            await asyncio.shield(start)
        except BaseException as error:
            with suppress(Exception):
                await start  # vLLM's start cannot be ended half-way
            await engine.shutdown()
            if isinstance(error, FathomError):
                raise FailedPrecondition(f"depth {depth}: {error}") from error
            if isinstance(error, Exception):
                raise FailedPrecondition(
                    f"the engine of depth {depth} could not be started: {error} (the server's log "
                    "has what vLLM says of it)"
                ) from error
            raise
        return engine

    async def _retire(self, engine: LevelEngine) -> None:
        """End an engine as soon as its last request has ended."""
        try:
            await engine.idle()
        finally:
            await engine.shutdown()
        logger.info("the engine of depth %d is not needed any more and has ended", engine.depth)

    def _engine_for(self, layers: LayerSelection) -> LevelEngine:
        engine = self._engines.get(layers)
        if engine is None:
            raise Unavailable("the level of this depth has just been removed")
        return engine

    def _require_tokenizer(self) -> ModelTokenizer:
        assert self._tokenizer is not None, "the engine has not been started"
        return self._tokenizer

    def _publish_metrics(self) -> None:
        from server.engine.dedicated.vllm_metrics import MergedMetrics

        self._metrics = MergedMetrics(self._registries)
        self._metrics.publish()

    def _registries(self) -> list[tuple[str, Registry]]:
        engines = self._engines  # safe in any thread: the dictionary is replaced, never changed
        return [
            (str(engine.depth), engine.registry)
            for engine in engines.values()
            if engine.registry is not None
        ]
