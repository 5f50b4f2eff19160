"""Sampling options of a client, checked against the limits of the model."""

from __future__ import annotations

from dataclasses import replace

from server.engine.base import ModelInfo, SamplingOptions, Structure, StructureKind
from server.errors import InvalidArgument
from server.serving.prompts import check_ids

# Patterns are compiled in the engine's process.
_MAX_PATTERN_CHARACTERS = 65536
_MAX_TEXTS = 1024


def checked_sampling(
    sampling: SamplingOptions, model: ModelInfo, num_prompt_tokens: int, max_logprobs: int
) -> SamplingOptions:
    """Return the options, with the limits that follow from the model and the prompt.

    Raises:
        InvalidArgument: an option is beyond the model's limits; the error names its field.
    """
    room = model.max_context - num_prompt_tokens
    check_ids(sampling.stop_token_ids, "stop.stop_token_ids", model.vocab_size)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    if sampling.min_tokens is not None and sampling.min_tokens > max_tokens:
        allowed = f"at most {max_tokens}, the most that can be generated"
        raise InvalidArgument("stop.min_tokens", sampling.min_tokens, allowed)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= max_logprobs:
        raise InvalidArgument("output.logprobs", sampling.logprobs, f"0 to {max_logprobs}")
    if sampling.prompt_logprobs is not None and not 0 <= sampling.prompt_logprobs <= max_logprobs:
        raise InvalidArgument(
            "output.prompt_logprobs", sampling.prompt_logprobs, f"0 to {max_logprobs}"
        )
    for token_id in sampling.logit_bias or ():
        if not 0 <= token_id < model.vocab_size:
            allowed = f"ids of 0 to {model.vocab_size - 1}"
            raise InvalidArgument("sampling.logit_bias", token_id, allowed)
    if sampling.allowed_token_ids is not None:
        if not sampling.allowed_token_ids:
            raise InvalidArgument("sampling.allowed_token_ids", [], "at least one token id")
        check_ids(sampling.allowed_token_ids, "sampling.allowed_token_ids", model.vocab_size)
    if sampling.structure is not None:
        _check_structure(sampling.structure)
    top_k = None if sampling.top_k is None else min(sampling.top_k, model.vocab_size)
    return replace(sampling, max_tokens=max_tokens, top_k=top_k)


def _check_structure(structure: Structure) -> None:
    """Raise :class:`InvalidArgument` for a form with no pattern, and for one that is too large."""
    field, pattern = "structure", structure.pattern
    if structure.kind is StructureKind.JSON_OBJECT:
        return
    if isinstance(pattern, tuple) and not (1 <= len(pattern) <= _MAX_TEXTS and all(pattern)):
        allowed = f"1 to {_MAX_TEXTS} texts that are not empty"
        raise InvalidArgument(field, f"{len(pattern)} texts", allowed)
    size = len(pattern) if isinstance(pattern, str) else sum(map(len, pattern))
    if not 1 <= size <= _MAX_PATTERN_CHARACTERS:
        allowed = f"1 to {_MAX_PATTERN_CHARACTERS} characters"
        raise InvalidArgument(field, f"{size} characters", allowed)
