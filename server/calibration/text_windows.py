"""Text cut into windows, the way that every measurement reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from pruning.text import TextError, token_windows

# The longest window of calibration and quality text, in tokens.
WINDOW = 512

# The shortest window: a token, and one that it predicts.
MIN_WINDOW = 2
_NUM_CHARACTERS_SHOWN = 40


class Tokenize(Protocol):
    """Turns a text into token ids, with the special ones of a text's beginning or without."""

    def __call__(self, text: str, *, special_tokens: bool = True) -> list[int]: ...


def text_windows(
    tokenize: Tokenize,
    texts: Iterable[str],
    *,
    max_context: int,
    max_tokens: int,
    vocab_size: int,
    window: int = WINDOW,
) -> list[list[int]]:
    """Cut ``texts`` into windows, each of which begins as a text of its own would.

    A window has at most ``window`` tokens, and one less than ``max_context``. Raises
    :class:`TextError` where the texts have no tokens, where one has a token that is none of the
    model's ``vocab_size``, and for a context too short for any window.
    """
    start = tokenize("")
    longest = min(window, max_context - 1 - len(start), WINDOW - len(start))
    if longest < MIN_WINDOW:
        needed = MIN_WINDOW + len(start) + 1
        raise TextError(
            f"max_context: a context of {max_context} tokens holds no window of text, "
            f"allowed: {needed} or more"
        )

    def documents() -> Iterator[list[int]]:
        for number, text in enumerate(texts, start=1):
            ids = tokenize(text, special_tokens=False)
            if ids and max(ids) >= vocab_size:
                raise TextError(
                    f"text {number} ({text[:_NUM_CHARACTERS_SHOWN]!r}...) has the token "
                    f"{max(ids)}, allowed: 0 to {vocab_size - 1}, the model's vocabulary; its "
                    "tokenizer has more tokens than the model"
                )
            yield ids

    if (first := max(start, default=0)) >= vocab_size:
        raise TextError(
            f"the tokenizer begins every text with the token {first}, allowed: 0 to "
            f"{vocab_size - 1}, the model's vocabulary"
        )
    return [start + ids for ids in token_windows(documents(), longest, max_tokens, MIN_WINDOW)]
