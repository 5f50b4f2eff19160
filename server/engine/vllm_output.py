"""What vLLM's output of one step says of a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.engine.base import FinishReason, GenerationDelta, SamplingOptions, TokenScore
from server.engine.model_tokenizer import ModelTokenizer
from server.engine.sampling import token_scores
from server.engine.stops import Stops
from server.errors import NonFiniteResult, RequestFailed

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


def generation_delta(
    output: RequestOutput, options: SamplingOptions, stops: Stops, tokenizer: ModelTokenizer
) -> GenerationDelta:
    """Return what a step has added to a request; raise what :func:`finish_reason_of` raises."""
    completion = output.outputs[0]
    metrics = output.metrics
    queue_seconds = 0.0
    if metrics is not None and metrics.scheduled_ts and metrics.queued_ts:
        queue_seconds = max(0.0, metrics.scheduled_ts - metrics.queued_ts)
    token_ids = tuple(completion.token_ids)
    text, stopped_by = completion.text, None
    if completion.finish_reason == "stop":
        last_token = token_ids[-1] if token_ids else None
        stopped_by = stops.stopped_by(completion.stop_reason, last_token)
        if options.include_stop and last_token is not None:
            text += stops.requested_specials.get(last_token, "")
    return GenerationDelta(
        text=text,
        token_ids=token_ids,
        scores=token_scores(token_ids, completion.logprobs, options.logprobs or 0, tokenizer),
        num_cached_tokens=output.num_cached_tokens or 0,
        queue_seconds=queue_seconds,
        finish_reason=finish_reason_of(completion.finish_reason),
        stopped_by=stopped_by,
    )


def check_finite(output: RequestOutput, scores: Sequence[TokenScore], depth: str) -> None:
    """Raise :class:`NonFiniteResult` if the model has computed what is not a finite number.

    Logits are looked at for each generated token, whether or not its score is asked for.
    """
    is_corrupted = output.metrics is not None and output.metrics.is_corrupted
    if is_corrupted or not all(math.isfinite(score.logprob) for score in scores):
        raise NonFiniteResult(depth)


def finish_reason_of(reason: str | None) -> FinishReason | None:
    """Return why a request has ended, None where it goes on.

    Raises :class:`RequestFailed` where the engine has given the request up.
    """
    match reason:
        case None:
            return None
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
        case _:
            raise RequestFailed(f"the engine has given up the request, with the reason '{reason}'")
