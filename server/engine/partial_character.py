"""Text that goes on from a prompt that ends within a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers.decoders

if TYPE_CHECKING:
    from server.engine.model_tokenizer import ModelTokenizer


def go_on_within_character(
    detokenizer: Any, tokenizer: ModelTokenizer, prompt_ids: Sequence[int]
) -> None:
    """Let vLLM's ``detokenizer`` of a request begin with the character that its prompt ends in.

    vLLM's would take all of such a prompt for generated text, and look for stop strings in it.
    Nothing is done for a prompt that ends with a whole character.
    """
    num_complete = tokenizer.num_complete(prompt_ids)
    if num_complete == len(prompt_ids) or not hasattr(detokenizer, "stream"):
        return
    skip = detokenizer.skip_special_tokens
    if num_complete is None:
        # The prompt has no text at all, so the generated text begins anew.
        detokenizer.stream = tokenizers.decoders.DecodeStream(skip_special_tokens=skip)
        return
    detokenizer.stream = tokenizers.decoders.DecodeStream(
        ids=list(prompt_ids[:num_complete]), skip_special_tokens=skip
    )
    for token_id in prompt_ids[num_complete:]:
        detokenizer.stream.step(detokenizer.tokenizer, token_id)
    whole = tokenizer.detokenize(prompt_ids[:num_complete])
    pending = tokenizer.detokenize_prompt(prompt_ids).removeprefix(whole)
    if pending:
        detokenizer.decode_next = _without(pending, detokenizer.decode_next)


def _without(prefix: str, decode_next: Callable[[int], str]) -> Callable[[int], str]:
    """Return ``decode_next`` without ``prefix``, text of the prompt, before its first text."""
    waiting = True

    def decode(token_id: int) -> str:
        nonlocal waiting
        text = decode_next(token_id)
        if waiting and text:
            waiting = False
            return text.removeprefix(prefix)
        return text

    return decode
