"""Sampling options of a client, checked against the limits of the model."""

from __future__ import annotations

from dataclasses import replace

from server.engine.base import ModelInfo, SamplingOptions
from server.errors import InvalidArgument
from server.serving.prompts import check_ids


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
    if sampling.logprobs is not None and sampling.logprobs > max_logprobs:
        raise InvalidArgument("output.logprobs", sampling.logprobs, f"0 to {max_logprobs}")
    top_k = None if sampling.top_k is None else min(sampling.top_k, model.vocab_size)
    return replace(sampling, max_tokens=max_tokens, top_k=top_k)
