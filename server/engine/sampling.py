"""Sampling options and scores, turned into vLLM's and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from server.engine.base import SamplingOptions, Structure, StructureKind, TokenScore

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.logprobs import Logprob
    from vllm.sampling_params import StructuredOutputsParams

    from server.engine.model_tokenizer import ModelTokenizer

# Options whose name and meaning vLLM shares.
_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)


def sampling_params(
    options: SamplingOptions,
    defaults: Mapping[str, Any],
    extra_args: dict[str, Any] | None = None,
) -> SamplingParams:
    """Return vLLM's parameters; ``defaults`` come from the model's generation config."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {name: value for name in _SAME_NAME if (value := getattr(options, name)) is not None}
    if options.max_tokens is not None and "min_tokens" in defaults:
        least = min(defaults["min_tokens"], options.max_tokens)
        defaults = {**defaults, "min_tokens": least}
    return SamplingParams(
        **{
            **defaults,
            **given,
            "max_tokens": options.max_tokens,
            "stop": list(options.stop),
            "stop_token_ids": list(options.stop_token_ids),
            "ignore_eos": options.ignore_eos,
            "include_stop_str_in_output": options.include_stop,
            "output_kind": RequestOutputKind.DELTA,
            "extra_args": extra_args,
            "logit_bias": options.logit_bias and dict(options.logit_bias),
            "bad_words": list(options.bad_words),
            "allowed_token_ids": options.allowed_token_ids and list(options.allowed_token_ids),
            "skip_special_tokens": not options.show_special_tokens,
            "structured_outputs": options.structure and _structured_outputs(options.structure),
        }
    )


def _structured_outputs(structure: Structure) -> StructuredOutputsParams:
    from vllm.sampling_params import StructuredOutputsParams

    match structure.kind:
        case StructureKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
        case StructureKind.CHOICE:
            return StructuredOutputsParams(choice=list(structure.pattern))
        case kind:
            pattern: dict[str, Any] = {kind.value: structure.pattern}
            return StructuredOutputsParams(**pattern)


def token_scores(
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None] | None,
    num_top: int,
    tokenizer: ModelTokenizer,
    *,
    with_greedy: bool = False,
) -> tuple[TokenScore, ...]:
    """Return the scores of ``token_ids``, each with the ``num_top`` most likely tokens.

    ``with_greedy``: each says whether no token was more likely.
    """
    if logprobs is None:
        return ()
    scores = []
    for token_id, candidates in zip(token_ids, logprobs, strict=True):
        if candidates is None:
            continue
        ranked = sorted(
            (entry.rank or 0, identity, entry) for identity, entry in candidates.items()
        )
        top = tuple(
            TokenScore(identity, entry.logprob, tokenizer.token_text(identity))
            for _, identity, entry in ranked[:num_top]
        )
        chosen = candidates[token_id]
        text = tokenizer.token_text(token_id)
        is_greedy = chosen.rank == 1 if with_greedy else None
        scores.append(TokenScore(token_id, chosen.logprob, text, top, is_greedy))
    return tuple(scores)
