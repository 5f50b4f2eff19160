"""The elastic engine: vLLM's AsyncLLM with a model that runs any depth."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.metrics import DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality
from server.engine.arguments import check_kv_cache, refusal, wants_huge_pages
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
from server.engine.elastic.compatibility import check_vllm
from server.engine.elastic.engine_arguments import (
    ElasticConfig,
    compiles_layers,
    prepare_elastic_environment,
    vllm_arguments,
)
from server.engine.elastic.measuring_client import MeasuringClient
from server.engine.elastic.payload import Payload
from server.engine.elastic.repair_client import RepairClient
from server.engine.measuring import check_windows
from server.engine.model_tokenizer import ModelTokenizer
from server.engine.prefix_cache import cache_salt
from server.engine.vllm_client import VllmClient, model_info
from server.errors import InvalidArgument

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_COMPILE_TIMEOUT_SECONDS = 600.0

logger = logging.getLogger(__name__)


class ElasticEngine:
    """Runs every depth of one model in one vLLM engine; see :class:`server.engine.base.Engine`."""

    name = "elastic"
    serves_any_depth = True
    restarts_itself = False

    def __init__(self, config: ElasticConfig) -> None:
        self.on_restart: Callable[[], None] = lambda: None
        self._config = config
        self._llm = VllmClient()
        self._model: ModelInfo | None = None
        self._repair = RepairClient(self._llm)
        self._measuring = MeasuringClient(self._llm)
        self._vllm_config: VllmConfig | None = None

    async def start(self) -> None:
        """Load the model, or load it again after its process has ended.

        Repair maps that can no longer be loaded are forgotten, and the log says so.

        Raises:
            IncompatibleVllm: The installed vLLM lacks what the engine needs.
            UnsupportedArchitecture: The model cannot run at several depths.
            InvalidArgument: An entry of ``engine_args`` is none that vLLM takes.
        """
        await self._llm.start(self._configure)
        await self._compile_layers()
        await self._repair.load_again()
        if wants_huge_pages(self._config):
            await self._llm.use_huge_pages()
        config = self._llm.model_config
        self._model = model_info(
            self._config.name,
            config,
            config.architectures[0].removeprefix("FathomElastic"),
            self._tokenizer,
        )

    def _configure(self) -> VllmConfig:
        prepare_elastic_environment(self._config.compile_cache)
        check_vllm()
        from server.engine.elastic.plugin import register

        register()
        arguments = vllm_arguments(self._config)
        try:
            config = arguments.create_engine_config()
        except Exception as error:  # its checks raise what they like
            raise refusal(error, self._config) from error
        check_kv_cache(config, self._config.kv_cache_gib)
        self._vllm_config = config
        return config

    @property
    def vllm_config(self) -> VllmConfig:
        assert self._vllm_config is not None, "the engine has not been started"
        return self._vllm_config

    async def _compile_layers(self) -> None:
        if not compiles_layers(self._config):
            return
        started = time.monotonic()
        answers = await self._llm.call_workers("fathom_compile_layers", _COMPILE_TIMEOUT_SECONDS)
        for num_layers, problem in answers:
            if not problem:
                seconds = time.monotonic() - started
                logger.info("compiled one layer for %d of them in %.1f s", num_layers, seconds)
            elif self._config.compile_layers:
                raise InvalidArgument("compile_layers", True, f"false here ({problem})")
            else:
                logger.warning("layers run uncompiled, which is slower: %s", problem)

    async def install_repair(self, path: Path) -> str:
        """Install what may stand in for skipped layers; see :meth:`RepairClient.install`."""
        return await self._repair.install(path)

    def has_repair(self, fingerprint: str) -> bool:
        return self._repair.has(fingerprint)

    async def shutdown(self) -> None:
        await self._llm.shutdown()

    async def prepare(
        self, plan: Plan, levels: Mapping[str, LayerSelection], progress: ProgressCallback
    ) -> None:
        """Do nothing: every depth can be run at any time."""

    def release_others(self, selections: Iterable[LayerSelection]) -> None:
        """Do nothing: no depth holds anything of its own."""

    def can_run(self, layers: LayerSelection) -> bool:
        return self.is_alive

    @property
    def model(self) -> ModelInfo:
        assert self._model is not None, "the engine has not been started"
        return self._model

    @property
    def is_alive(self) -> bool:
        return self._llm.is_alive

    @property
    def process_ids(self) -> Sequence[int]:
        return self._llm.process_ids

    async def ping(self) -> None:
        await self._llm.ping()

    def load(self) -> LoadInfo:
        return self._llm.load

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return self._tokenizer.tokenize(text, special_tokens=special_tokens)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self._tokenizer.tokenize_chat(messages)

    def detokenize_prompt(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.detokenize_prompt(token_ids)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._tokenizer.token_texts(token_ids)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        self._repair.check(request.layers)
        return self._llm.generate(
            request.request_id,
            request.prompt_ids,
            request.sampling,
            Payload(request.layers).to_extra_args(),
            cache_salt=cache_salt(request.layers, request.cache_namespace, request.cache_salt),
            depth=request.layers.depth_text(self.model.num_layers),
        )

    async def score(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_context: int,
        layers: LayerSelection,
        cache_namespace: CacheNamespace | None = None,
    ) -> list[TokenScore]:
        self._repair.check(layers)
        params = self._llm.sampling_params(
            SamplingOptions(max_tokens=1, temperature=0.0),
            Payload(layers, num_context).to_extra_args(),
        )
        scores = await self._llm.prompt_scores(
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
        return await self._measuring.importance(windows, progress, is_enough)

    async def fit_repair(
        self,
        windows: Sequence[Sequence[int]],
        path: Path,
        *,
        model_fingerprint: str,
        text_fingerprint: str,
        progress: ProgressCallback,
    ) -> None:
        """Fit a repair map for every layer, and write them to ``path``.

        Raises:
            RepairError: There is too little text, the states are not finite, or the file cannot
                be written.
        """
        check_windows(windows, self.model)
        fingerprints = {
            "model_fingerprint": model_fingerprint,
            "text_fingerprint": text_fingerprint,
        }
        await self._measuring.fit_repair(windows, path, fingerprints, progress)

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        check_windows(windows, self.model)
        for layers in selections:
            self._repair.check(layers)
        return await self._measuring.quality(windows, selections, progress)

    @property
    def _tokenizer(self) -> ModelTokenizer:
        return self._llm.tokenizer
