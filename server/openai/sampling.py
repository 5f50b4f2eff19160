"""Sampling options of a request of OpenAI's API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from server.engine.base import SamplingOptions, Structure, StructureKind
from server.errors import InvalidArgument
from server.serving.completions import seed_of

if TYPE_CHECKING:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

_SEEDS = 2**63


def sampling_options(
    request: CompletionRequest | ChatCompletionRequest,
    choice: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingOptions:
    """Return the options of one of the request's choices.

    What the client leaves open is left to the model's defaults, as with gRPC. Each choice has a
    seed of its own.
    """
    seed = request.seed
    if seed is not None and seed < 0:
        raise InvalidArgument("seed", seed, f"0 to {_SEEDS - 1}")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    return SamplingOptions(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=seed_of(seed, choice),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or None,
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        include_stop=request.include_stop_str_in_output,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_logit_bias(request.logit_bias),
        bad_words=tuple(request.bad_words or ()),
        allowed_token_ids=(
            None if request.allowed_token_ids is None else tuple(request.allowed_token_ids)
        ),
        show_special_tokens=not request.skip_special_tokens,
        structure=_structure(request),
    )


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if not given:
        return None
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise InvalidArgument("logit_bias", name, "token ids, with numbers of -100 to 100")
        if not -100 <= value <= 100:
            raise InvalidArgument(f"logit_bias[{name}]", value, "-100 to 100")
        bias[int(name)] = value
    return bias


def _structure(request: CompletionRequest | ChatCompletionRequest) -> Structure | None:
    """Return the form that the answer must have.

    That of tools, which vLLM's parser adds, is among the request's own fields.
    """
    given = request.extract_structured_outputs()
    if given is None:
        return None
    for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if getattr(given, name, None):
            raise InvalidArgument(f"structured_outputs.{name}", True, "none: the server decides it")
    for kind in StructureKind:
        pattern = getattr(given, kind.value, None)
        if pattern is None or pattern is False:
            continue
        match kind:
            case StructureKind.JSON_OBJECT:
                return Structure(kind)
            case StructureKind.CHOICE:
                return Structure(kind, tuple(pattern))
            case _:
                return Structure(kind, pattern if isinstance(pattern, str) else json.dumps(pattern))
    return None
