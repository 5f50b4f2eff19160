"""Passages of held-out text, each with four continuations, one of which is the true one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.probes.pieces import ProbeTextError, pieces

NUM_CHOICES = 4
_SEED = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """The beginning of a passage, and continuations of equal length in tokens.

    The one at ``true_index`` is the passage's own, the others are those of other passages.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    true_index: int


def passages(
    windows: Sequence[Sequence[int]],
    *,
    num_context: int,
    num_continued: int,
    at_least: int,
    at_most: int,
) -> list[Passage]:
    """Cut ``windows`` into passages of ``num_context`` and ``num_continued`` tokens.

    The false continuations are those of passages of other windows, where there are enough of
    them, and no two of a passage are equal. Which they are, and where among them the true one
    stands, is drawn with a fixed seed: equal windows give equal passages. Raises
    :class:`ProbeTextError`, which says how much text is needed, for fewer than ``at_least``.
    """
    length = num_context + num_continued
    cut = pieces(windows, length, at_least=at_least, at_most=at_most)
    rng = random.Random(_SEED)
    found = []
    for piece in cut:
        true = piece.token_ids[num_context:]
        elsewhere = [each for each in cut if each.window != piece.window]
        false = None
        for others in (elsewhere, cut):
            endings = {each.token_ids[num_context:] for each in others} - {true}
            if len(endings) >= NUM_CHOICES - 1:
                # Sorted, because the order of a set is not that of equal sets.
                false = rng.sample(sorted(endings), NUM_CHOICES - 1)
                break
        if false is not None:
            true_index = rng.randrange(NUM_CHOICES)
            false.insert(true_index, true)
            found.append(Passage(piece.token_ids[:num_context], tuple(false), true_index))
    if len(found) < at_least:
        raise ProbeTextError(
            f"the held-out text repeats itself: {len(found)} of its passages of {length} tokens "
            f"have {NUM_CHOICES - 1} false continuations, allowed: {at_least} or more"
        )
    return found
