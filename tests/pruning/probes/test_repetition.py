"""Repetition in generated text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import NGRAM, repeated_share

TOKENS = st.lists(st.integers(0, 2), max_size=30)


@given(TOKENS, st.integers(1, 5))
def test_the_share_of_positions_whose_ngram_was_there_before(tokens: list[int], n: int) -> None:
    starts = range(len(tokens) - n + 1)
    repeated = [
        any(tokens[earlier : earlier + n] == tokens[start : start + n] for earlier in range(start))
        for start in starts
    ]
    expected = sum(repeated) / len(repeated) if repeated else 0.0
    assert repeated_share(tokens, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1] * (NGRAM - 1), 0.0),
        (list(range(20)), 0.0),
        ([1] * (NGRAM + 3), 0.75),  # one of four is new
        ([1, 2, 3, 4, 5] * 4, 12 / 17),
    ],
)
def test_known_shares(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)
