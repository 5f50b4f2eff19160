"""The interface between the service and the engines, which run tokens."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pruning.metrics import DensePassSums
from pruning.plan import Plan
from pruning.quality import Quality

# Called with (done, total), in tokens or in engines that have been started.
ProgressCallback = Callable[[int, int], None]
# Called with what has been measured of the layers so far, for each group of windows: whether that
# is enough.
IsEnough = Callable[[Sequence[DensePassSums]], Awaitable[bool]]


async def never_enough(sums: Sequence[DensePassSums]) -> bool:
    """Let a measurement go on to the end of its text."""
    return False


class EngineDead(Exception):
    """The process that runs tokens has ended; what it was doing is lost."""


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """The layers that a request leaves out, in ascending order, and what does their work.

    ``repair`` is the fingerprint of the maps or gated MLPs that stand in for skipped layers
    (:mod:`pruning.repair`); None: a skipped layer leaves the residual stream as it is.
    """

    prefill_skips: tuple[int, ...] = ()
    decode_skips: tuple[int, ...] = ()
    repair: str | None = None

    def depth_text(self, num_layers: int) -> str:
        """Return the depth that is left of ``num_layers`` in words, such as "depth 8"."""
        prefill = num_layers - len(self.prefill_skips)
        decode = num_layers - len(self.decode_skips)
        if self.prefill_skips == self.decode_skips:
            return f"depth {decode}"
        return f"prefill depth {prefill} and decode depth {decode}"


@dataclass(frozen=True, slots=True)
class CacheNamespace:
    """Whom a request shares entries of the prefix cache with: requests of an equal namespace.

    ``name`` may be anything, also what clients choose: names of different kinds are different.
    """

    kind: Literal["everyone", "client", "address"]
    name: str = ""


# The namespace of clients that trust each other.
EVERYONE = CacheNamespace("everyone")


class StructureKind(enum.Enum):
    """What a generated text is held to; the values are vLLM's names."""

    JSON_SCHEMA = "json"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"
    # Any object of JSON.
    JSON_OBJECT = "json_object"
    # Tags around structured parts of the text, as calls of tools have; JSON of xgrammar's.
    TAGS = "structural_tag"


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that a generated text must have.

    ``pattern`` is a JSON schema or tags as text, a regular expression, a grammar in EBNF, or the
    texts to choose among; empty for any JSON object.
    """

    kind: StructureKind
    pattern: str | tuple[str, ...] = ""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen and when to stop; ``None`` leaves it to the model's defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    # How many of the most likely tokens are reported; None: no log-probabilities at all.
    logprobs: int | None = None
    # The same for the tokens of the prompt, each but the first.
    prompt_logprobs: int | None = None
    # Added to the logits of tokens, by id.
    logit_bias: Mapping[int, float] | None = None
    # Texts that are never generated.
    bad_words: tuple[str, ...] = ()
    # The only tokens that may be generated; None: all.
    allowed_token_ids: tuple[int, ...] | None = None
    # Whether the text shows special tokens.
    show_special_tokens: bool = False
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to generate from ``prompt_ids`` with some layers left out.

    Without a ``cache_namespace`` it shares entries of the prefix cache with no other request, and
    within one only with requests of an equal ``cache_salt``.
    """

    request_id: str
    prompt_ids: Sequence[int]
    layers: LayerSelection
    sampling: SamplingOptions
    cache_namespace: CacheNamespace | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The log-probability, in nats, of a token, with the most likely ones in its place."""

    token_id: int
    logprob: float
    text: str
    top: tuple[TokenScore, ...] = ()
    # Whether no token was more likely; None where that was not looked at.
    is_greedy: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerationDelta:
    """What one step added to a request; the last one has a ``finish_reason``."""

    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    num_cached_tokens: int = 0
    # Seconds that the request waited in the engine before its prompt was begun.
    queue_seconds: float = 0.0
    finish_reason: FinishReason | None = None
    # The stop string or the stop token that ended the request.
    stopped_by: str | int | None = None
    # Those of the prompt's tokens but the first, where they were asked for, in the first delta.
    prompt_scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that an engine has loaded."""

    name: str
    architecture: str
    dtype: str
    quantization: str
    num_layers: int
    # Ids below it have a row in the model's embedding and are within the tokenizer's vocabulary.
    vocab_size: int
    max_context: int
    # The length of the longest text that one token stands for.
    max_characters_per_token: int


@dataclass(frozen=True, slots=True)
class LoadInfo:
    """The number of requests in the engine at this moment."""

    num_running: int
    num_waiting: int


@runtime_checkable
class RepairsLayers(Protocol):
    """An engine that can let maps or gated MLPs stand in for the layers that a request skips."""

    async def fit_repair(
        self,
        windows: Sequence[Sequence[int]],
        path: Path,
        *,
        model_fingerprint: str,
        text_fingerprint: str,
        progress: ProgressCallback,
    ) -> None:
        """Fit a map for every layer on ``windows``, and write them to ``path``.

        Raises :class:`pruning.repair.RepairError` for too little text, for states that are not
        finite, and for a file that cannot be written.
        """

    def has_repair(self, fingerprint: str) -> bool:
        """Return whether requests may ask for these maps or MLPs.

        An engine whose process has ended keeps them, unless they cannot be loaded by the next
        one. Callable from any thread.
        """
        ...

    async def install_repair(self, path: Path) -> str:
        """Load the maps or gated MLPs in ``path``, beside those that were installed before.

        Returns the fingerprint by which requests ask for them.

        Raises :class:`pruning.repair.RepairError` for those that are damaged or do not fit the
        model, and :class:`OSError` for a file that cannot be read.
        """
        ...


@runtime_checkable
class RunsVllm(Protocol):
    """An engine of vLLM, whose configuration parts of vLLM outside the engine need, too.

    It is known once the engine has been started.
    """

    @property
    def vllm_config(self) -> Any: ...


class Engine(Protocol):
    """Runs tokens of one model at many depths.

    Every method but ``start`` and ``shutdown`` raises :class:`EngineDead` once the process that
    runs tokens has ended. Cancelling the task that iterates over ``generate``, or closing the
    iterator, frees the engine at once.
    """

    name: str
    # Whether requests may have any depth. If not, they have those of ``prepare``, the same for
    # prompt and generated tokens.
    serves_any_depth: bool
    # Whether the engine restarts ended processes itself and calls ``on_restart`` each time; then
    # ``start`` only waits for it.
    restarts_itself: bool
    on_restart: Callable[[], None]

    async def start(self) -> None:
        """Load the model; may be called again after :class:`EngineDead`.

        Repair maps are loaded again, too. If that fails, the engine runs without them.
        """

    async def shutdown(self) -> None: ...

    async def prepare(
        self, plan: Plan, levels: Mapping[str, LayerSelection], progress: ProgressCallback
    ) -> None:
        """Get ready to run the layers of each of ``levels``, and go on running the present ones.

        Raises :class:`FailedPrecondition` if that is impossible; nothing is changed then.
        """
        ...

    def release_others(self, selections: Iterable[LayerSelection]) -> None:
        """Release prepared selections other than these, each when its last request has ended."""
        ...

    def can_run(self, layers: LayerSelection) -> bool:
        """Return whether a request for these layers would run now; callable from any thread."""
        ...

    @property
    def model(self) -> ModelInfo: ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def process_ids(self) -> Sequence[int]:
        """The processes that run tokens, without those that they have started themselves."""
        ...

    async def ping(self) -> None:
        """Return when the engine has answered, which it does between two steps."""

    def load(self) -> LoadInfo: ...

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]: ...

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt that the model's chat template makes of ``messages``.

        Raises:
            FailedPrecondition: The model has no chat template.
            InvalidArgument: The template refuses these messages.
        """
        ...

    def detokenize_prompt(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt, up to the character that it ends within, if it does."""
        ...

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return what each token adds to a text, the space before a word included."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """Yield what each step adds to the request.

        Raises:
            InvalidArgument: The model cannot serve an option.
            RequestFailed: The engine has given up this request.
            NonFiniteResult: The model computes what is not a finite number.
        """
        ...

    async def score(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_context: int,
        layers: LayerSelection,
        cache_namespace: CacheNamespace | None = None,
    ) -> list[TokenScore]:
        """Return the scores of ``token_ids[num_context:]``; ``num_context`` is at least 1.

        The context runs as a prompt would, the scored tokens as generated ones. See
        :class:`GenerationRequest` for the namespace. Raises the same as :meth:`generate`.
        """
        ...

    async def measure_importance(
        self,
        windows: Sequence[Sequence[int]],
        progress: ProgressCallback,
        is_enough: IsEnough = never_enough,
    ) -> list[DensePassSums]:
        """Measure what metrics rank by over ``windows`` of token ids, at full depth.

        Returns the sums of each group of windows, in their order; see
        :func:`server.engine.measuring.importance_parts`. The measurement ends early where
        ``is_enough`` says so of those that it has. Raises :class:`InvalidArgument` for an id that
        is not below the model's ``vocab_size``.
        """
        ...

    async def measure_quality(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        """Measure each selection on the second half of each window, given the first half.

        What the engine cannot know is None in the quality. Raises :class:`InvalidArgument` for an
        id that is not below the model's ``vocab_size``, and :class:`NonFiniteResult`.
        """
        ...
