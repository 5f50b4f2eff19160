"""The elastic engine: vLLM's AsyncLLM with a model that runs any depth."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pruning.metrics import DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality
from pruning.repair import (
    Healing,
    RepairError,
    check_fit_tokens,
    layers_at_a_time,
    split_windows,
    summarize_maps,
)
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
from server.engine.elastic.payload import (
    GramProbe,
    ImportanceProbe,
    Payload,
    Probe,
    QualityProbe,
)
from server.engine.measuring import (
    check_windows,
    finite_quality,
    importance_parts,
    reference_sums,
)
from server.engine.model_tokenizer import ModelTokenizer
from server.engine.pace import present_gate
from server.engine.prefix_cache import cache_salt
from server.engine.token_progress import TokenProgress, first_failure
from server.engine.vllm_client import VllmClient, model_info
from server.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_COMPILE_TIMEOUT_SECONDS = 600.0
# Maps of a large model are some gigabytes.
_MAPS_TIMEOUT_SECONDS = 600.0
_FIRST_FIT_POLL_SECONDS = 0.01
_FIT_POLL_SECONDS = 0.5
# Tokens whose reference states are held in the worker at one time.
_QUALITY_GROUP_TOKENS = 8192
# Measurements leave the rest of the batch to clients.
_MEASURING_REQUESTS = 16


logger = logging.getLogger(__name__)


class _InstalledRepair(NamedTuple):
    """A file of what stands in for skipped layers, and how it was trained; None: it was not."""

    path: Path
    healing: Healing | None


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
        self._numbers = itertools.count()
        self._measuring = asyncio.Lock()
        # What requests may ask to stand in for the layers that they skip, by fingerprint.
        self._repairs: dict[str, _InstalledRepair] = {}
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
        await self._load_installed_repairs()
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
        """Let the maps or gated MLPs in ``path`` stand in for the layers that a request skips.

        Returns their fingerprint, which requests that want them carry in
        :attr:`LayerSelection.repair`. Requests may go on to ask for those that were installed
        before: requests with different maps share a batch. They are loaded again, from the same
        file, after the engine's process has ended. What was trained stands in for the layers that
        it was trained for, as :meth:`pruning.repair.Healing.serves` says; a request with other
        layers that asks for it is refused.

        Raises:
            RepairError: The maps are damaged, or do not fit the model.
            OSError: The file cannot be read.
        """
        summary = summarize_maps(path)
        await self._load_stand_ins(path, summary.fingerprint)
        self._repairs[summary.fingerprint] = _InstalledRepair(path, summary.healing)
        return summary.fingerprint

    async def _load_installed_repairs(self) -> None:
        """Load all installed maps into a new process; forget those that can be had no longer."""
        for fingerprint, (path, _) in list(self._repairs.items()):
            try:
                await self._load_stand_ins(path, fingerprint)
            except (RepairError, OSError) as error:
                logger.error("repair maps are not loaded again: %s", error)
                del self._repairs[fingerprint]

    async def _load_stand_ins(self, path: Path, fingerprint: str) -> None:
        await self._call_for_repair("fathom_load_stand_ins", str(path), fingerprint)

    def has_repair(self, fingerprint: str) -> bool:
        return fingerprint in self._repairs

    def _check_repair(self, layers: LayerSelection) -> None:
        if layers.repair is None:
            return
        installed = self._repairs.get(layers.repair)
        if installed is None:
            raise FailedPrecondition(
                f"repair: the layers are to be repaired by the maps {layers.repair}, but the "
                f"engine has {', '.join(self._repairs) or 'none'}"
            )
        healing = installed.healing
        if healing and not healing.serves(layers.prefill_skips, layers.decode_skips):
            raise FailedPrecondition(
                f"repair: {layers.repair} was trained for the skipped layers "
                f"{list(healing.skipped)}, but the request skips {list(layers.prefill_skips)} for "
                f"its prompt and {list(layers.decode_skips)} for what it generates; allowed: these "
                "for both, or for one of them and none for the other"
            )

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
        self._check_repair(request.layers)
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
        self._check_repair(layers)
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
        reporter = TokenProgress(progress, windows)
        groups: list[DensePassSums] = []
        async with self._measuring:
            # What a measurement that was cancelled has left.
            await self._llm.call_workers("fathom_take_importance")
            for part in importance_parts(windows):
                requests = [
                    (window, Payload(LayerSelection(), probe=ImportanceProbe(number)))
                    for number, group in enumerate(part)
                    for window in group
                ]
                await self._prefill_all(requests, reporter)
                groups += await self._take_importance()
                if await is_enough(groups):
                    reporter.finish()
                    break
        return groups

    async def _take_importance(self) -> list[DensePassSums]:
        """Return the sums of each group, which the ranks may have of different layers."""
        groups: dict[int, DensePassSums] = {}
        for answer in await self._llm.call_workers("fathom_take_importance"):
            for group, fields in answer:
                sums = DensePassSums(**fields)
                groups[group] = groups[group] + sums if group in groups else sums
        return [groups[group] for group in sorted(groups)]

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
        fit, held_out = split_windows(windows)
        hidden_size = self._llm.model_config.get_hidden_size()
        num_layers, num_tokens = self.model.num_layers, sum(map(len, fit))
        check_fit_tokens(num_tokens, hidden_size)
        group_size = layers_at_a_time(hidden_size)
        starts = range(0, num_layers, group_size)
        reporter = TokenProgress(progress, windows, num_passes=len(starts))
        requests = [
            (window, Payload(LayerSelection(), probe=GramProbe(held_out=part is held_out)))
            for part in (fit, held_out)
            for window in part
        ]
        async with self._measuring:
            for start in starts:
                group = list(range(start, min(start + group_size, num_layers)))
                await self._llm.call_workers("fathom_reset_repair", args=(group, start > 0))
                await self._prefill_all(requests, reporter)
                for layer in group:
                    await self._fit_layer(layer)
            provenance = {
                "num_layers": num_layers,
                "model_fingerprint": model_fingerprint,
                "text_fingerprint": text_fingerprint,
                "num_tokens": num_tokens,
            }
            await self._call_for_repair("fathom_save_repair", str(path), provenance)

    async def _fit_layer(self, layer: int) -> None:
        """Fit the map of a layer while the engine serves."""
        await self._llm.call_workers("fathom_begin_fit", args=(layer,))
        delay = _FIRST_FIT_POLL_SECONDS
        while None in (answers := await self._llm.call_workers("fathom_end_fit")):
            await asyncio.sleep(delay)
            delay = min(2 * delay, _FIT_POLL_SECONDS)
        _raise_problem(answers)

    async def _call_for_repair(self, method: str, *args: object) -> None:
        _raise_problem(await self._llm.call_workers(method, _MAPS_TIMEOUT_SECONDS, args))

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        check_windows(windows, self.model)
        for layers in selections:
            self._check_repair(layers)
        dense = LayerSelection()
        # The reference of the others is the dense model itself.
        pruned = list(dict.fromkeys(s for s in selections if s != dense)) or [dense]
        sums: list[list[list[float]]] = [[] for _ in pruned]
        reporter = TokenProgress(progress, windows, num_passes=len(pruned) + 1)
        group_size = max(1, _QUALITY_GROUP_TOKENS // max(map(len, windows)))
        async with self._measuring:
            for start in range(0, len(windows), group_size):
                group = list(enumerate(windows[start : start + group_size]))
                await self._llm.call_workers("fathom_reset_quality")
                for index, layers in [(None, dense), *enumerate(pruned)]:
                    payloads = [
                        (window, _quality_payload(number, index, len(window), layers))
                        for number, window in group
                    ]
                    await self._prefill_all(payloads, reporter)
                for answer in await self._llm.call_workers("fathom_quality_sums"):
                    for _, selection, window_sums in answer:
                        sums[selection].append(window_sums)
            await self._llm.call_workers("fathom_reset_quality")
        by_layers = dict(zip(pruned, sums, strict=True))
        by_layers[dense] = [reference_sums(window_sums) for window_sums in sums[0]]
        return [
            finite_quality(by_layers[layers], layers.depth_text(self.model.num_layers))
            for layers in selections
        ]

    async def _prefill_all(
        self, requests: Sequence[tuple[Sequence[int], Payload]], progress: TokenProgress
    ) -> None:
        gate = present_gate()
        slots = asyncio.Semaphore(_MEASURING_REQUESTS if gate is None else 1)

        async def prefill(token_ids: Sequence[int], payload: Payload) -> None:
            async with slots:
                if gate is not None:
                    await gate()
                await self._llm.prefill(
                    f"measure-{next(self._numbers)}",
                    token_ids,
                    payload.to_extra_args(),
                    cache_salt=cache_salt(payload.layers, None),
                    depth=payload.layers.depth_text(self.model.num_layers),
                )
                progress.advance(len(token_ids))

        try:
            async with asyncio.TaskGroup() as group:
                for token_ids, payload in requests:
                    group.create_task(prefill(token_ids, payload))
        except* Exception as failures:
            raise first_failure(failures) from None

    @property
    def _tokenizer(self) -> ModelTokenizer:
        return self._llm.tokenizer


def _raise_problem(answers: Sequence[str | None]) -> None:
    """Raise what a worker has answered that prevents a fit or a load of maps."""
    for problem in answers:
        if problem:
            raise RepairError(problem)


def _quality_payload(
    window: int, selection: int | None, length: int, layers: LayerSelection
) -> Payload:
    half = length // 2
    probe: Probe = QualityProbe(window, selection, first_scored=half)
    return Payload(layers, num_context=half, probe=probe)
