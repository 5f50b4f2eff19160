"""Repetition in generated text."""

from __future__ import annotations

from collections.abc import Sequence

# Four tokens in a row seldom recur within a few dozen, unless the text repeats itself.
NGRAM = 4


def repeated_share(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of the n-grams of a text that have occurred in it before, 0 to 1.

    That is 1 - distinct n-grams / n-grams, the rep-n of Welleck et al., "Neural Text Generation
    with Unlikelihood Training", section 6.1. A text of fewer than n tokens has none: 0.
    """
    num_ngrams = len(token_ids) - n + 1
    if num_ngrams < 1:
        return 0.0
    distinct = {tuple(token_ids[i : i + n]) for i in range(num_ngrams)}
    return 1 - len(distinct) / num_ngrams
