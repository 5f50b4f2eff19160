"""Passages with one true continuation and three false ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.probes import NUM_CHOICES, Passage, ProbeTextError, passages


def text(num_windows: int, length: int, seed: int = 0, vocabulary: int = 1000) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(num_windows)]


def cut(windows: list[list[int]], at_least: int = 1, at_most: int = 64) -> list[Passage]:
    return passages(windows, num_context=6, num_continued=3, at_least=at_least, at_most=at_most)


@given(st.integers(1, 6), st.integers(36, 90), st.integers(0, 5), st.sampled_from([2, 5, 1000]))
def test_a_passage_goes_on_with_its_own_continuation_alone(
    num_windows: int, length: int, seed: int, vocabulary: int
) -> None:
    windows = text(num_windows, length, seed, vocabulary)
    pieces = {
        (number, tuple(window[start : start + 9]))
        for number, window in enumerate(windows)
        for start in range(0, length - 8, 9)
    }
    try:
        found = cut(windows)
    except ProbeTextError:
        assert len({piece[6:] for _, piece in pieces}) < NUM_CHOICES
        return
    assert len(found) <= num_windows * (length // 9)
    for passage in found:
        assert [len(each) for each in passage.continuations] == [3] * NUM_CHOICES
        assert len(set(passage.continuations)) == NUM_CHOICES, "no two are equal"
        true = passage.continuations[passage.true_index]
        own = {number for number, piece in pieces if piece == passage.context + true}
        assert own
        others = {piece[6:] for number, piece in pieces if number not in own}
        false = set(passage.continuations) - {true}
        if len(own) == 1 and len(others - {true}) >= NUM_CHOICES - 1:
            assert false <= others, "from other windows"
        assert false <= {piece[6:] for _, piece in pieces}


def test_the_true_one_is_anywhere_and_the_same_each_time() -> None:
    windows = text(8, 90)
    found = cut(windows)
    assert found == cut([list(window) for window in windows])
    counts = [sum(passage.true_index == i for passage in found) for i in range(NUM_CHOICES)]
    assert len(found) == 64
    assert min(counts) >= 8


def test_the_first_passages_are_of_all_windows() -> None:
    windows = text(5, 90)
    found = cut(windows, at_most=5)
    assert [passage.context for passage in found] == [tuple(window[:6]) for window in windows]


def test_too_little_text() -> None:
    with pytest.raises(ProbeTextError, match=r"give 2 pieces of 9 tokens, allowed: 3 or more, "):
        cut(text(2, 17), at_least=3)
    with pytest.raises(ProbeTextError, match=r"^the held-out text repeats itself: 0 of its"):
        cut([[7] * 900])
