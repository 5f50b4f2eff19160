"""Pieces of held-out text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import ProbeTextError, pieces

# Every token is its own, so that a piece tells where it comes from.
LENGTHS = st.lists(st.integers(0, 20), max_size=6)


def windows_of(lengths: list[int]) -> list[list[int]]:
    return [[100 * number + i for i in range(length)] for number, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 6), st.integers(1, 30))
def test_pieces_are_parts_of_windows_and_take_turns(
    lengths: list[int], length: int, at_most: int
) -> None:
    windows = windows_of(lengths)
    found = pieces(windows, length, at_least=0, at_most=at_most)
    assert len(found) == min(at_most, sum(len(window) // length for window in windows))
    seen = [token for piece in found for token in piece.token_ids]
    assert len(set(seen)) == len(seen) == length * len(found), "they do not overlap"
    counts = [0] * len(windows)
    for piece in found:
        start = counts[piece.window] * length
        assert list(piece.token_ids) == windows[piece.window][start : start + length]
        counts[piece.window] += 1
        full = [number for number, window in enumerate(windows) if len(window) // length]
        for other in full:
            has_more = len(windows[other]) // length > counts[other]
            assert counts[piece.window] - counts[other] <= 1 or not has_more


@given(LENGTHS, st.integers(1, 6), st.integers(1, 10))
def test_too_little_text_says_how_much_it_takes(
    lengths: list[int], length: int, at_least: int
) -> None:
    windows = windows_of(lengths)
    num_found = sum(len(window) // length for window in windows)
    if num_found >= at_least:
        assert len(pieces(windows, length, at_least=at_least, at_most=at_least)) == at_least
        return
    with pytest.raises(ProbeTextError) as caught:
        pieces(windows, length, at_least=at_least, at_most=at_least)
    assert str(caught.value) == (
        f"the held-out text has {sum(lengths)} tokens in {len(lengths)} windows, which give "
        f"{num_found} pieces of {length} tokens, allowed: {at_least} or more, which takes "
        f"{at_least * length} tokens or more"
    )
