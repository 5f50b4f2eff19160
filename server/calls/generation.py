"""Requests of clients and the answers, apart from the transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.depth.depth_choice import DepthChoice
from server.depth.served_depth import ServedDepth
from server.engine.base import FinishReason, GenerationDelta, SamplingOptions, TokenScore


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    # Whether the special tokens that begin every text are put before it.
    special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages of ``role`` and ``content``, oldest first."""

    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A chat that is rendered in a way of its own, such as one with tools.

    ``render`` returns the prompt as text, special tokens included; it is called in a thread, and
    raises :class:`server.errors.FathomError`.
    """

    render: Callable[[], str]
    num_characters: int


Prompt = TextPrompt | TokenPrompt | ChatPrompt | RenderedPrompt


@dataclass(frozen=True, slots=True)
class Generation:
    """A request for generated tokens; an empty ``request_id`` asks for one to be made."""

    prompt: Prompt
    depth: DepthChoice = None
    prefill_depth: DepthChoice = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    # Whether the text begins with that of the prompt.
    echo: bool = False
    request_id: str = ""
    # Splits what the client shares in the prefix cache: requests of equal salts share entries.
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Comes first: the request is admitted, and how it will be served."""

    request_id: str
    num_prompt_tokens: int
    served: ServedDepth
    prompt_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """In seconds, from the moment that the request came."""

    queue: float
    time_to_first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class FinishInfo:
    """Comes last."""

    reason: FinishReason
    # The stop string or the stop token that ended the text.
    stopped_by: str | int | None
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    timings: Timings
    served: ServedDepth


# Between PromptInfo and FinishInfo come what the engine's steps added.
GenerationEvent = PromptInfo | GenerationDelta | FinishInfo


@dataclass(frozen=True, slots=True)
class Scoring:
    """A request for the log-probabilities of the tokens of ``continuation``.

    Without a context every token of the continuation but the first is scored.
    """

    continuation: TextPrompt | TokenPrompt
    context: TextPrompt | TokenPrompt | None = None
    depth: DepthChoice = None
    prefill_depth: DepthChoice = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class ScoringResult:
    """The scores, in nats, of each scored token."""

    scores: tuple[TokenScore, ...]
    served: ServedDepth
