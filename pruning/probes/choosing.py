"""Choosing: whether a pruned model tells true continuations from false ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.probes.passages import NUM_CHOICES, Passage


@dataclass(frozen=True, slots=True)
class Choosing:
    """How a pruned model chooses among given continuations of ``num_items`` passages.

    ``accuracy`` is the share of passages whose true continuation it finds most likely, and
    ``chance`` what guessing would get. ``agreement`` is the share for which it chooses what the
    dense model does; None where there is no dense model. The standard errors are those of
    :func:`share_stderr`.
    """

    accuracy: float
    accuracy_stderr: float
    agreement: float | None
    agreement_stderr: float | None
    num_items: int
    chance: float

    def loss(self, dense: Choosing) -> tuple[float, float]:
        """Return how much less often it is right than ``dense``, and the standard error of that.

        Both choose for the same passages, so only those for which they choose differently add to
        the error: with a share d of them and a loss x, the variance over n passages is at most
        (d - x ** 2) / n. Where the agreement is not known, the two are taken for independent.
        """
        lost = dense.accuracy - self.accuracy
        if self.agreement is None:
            return lost, math.hypot(self.accuracy_stderr, dense.accuracy_stderr)
        differing = 1 - self.agreement
        return lost, math.sqrt(max(differing - lost**2, 0.0) / self.num_items)


def choices(logprobs: Sequence[Sequence[float]]) -> list[int]:
    """Return the most likely continuation of each passage, the first among equals.

    ``logprobs`` has the summed log-probability of each continuation, in nats.
    """
    return [max(range(len(each)), key=each.__getitem__) for each in logprobs]


def choosing(
    items: Sequence[Passage], chosen: Sequence[int], dense_chosen: Sequence[int] | None
) -> Choosing:
    """Return how ``chosen``, one choice for each of ``items``, compares with what is true.

    Raises :class:`ValueError` for no items, and for choices that are not one for each.
    """
    num_items = len(items)
    for name, each in (("chosen", chosen), ("dense_chosen", dense_chosen)):
        if each is not None and len(each) != num_items:
            raise ValueError(f"{name}: got {len(each)} choices, allowed: {num_items}, one for each")
    if not num_items:
        raise ValueError("items: got none, allowed: 1 or more")
    right = sum(item.true_index == choice for item, choice in zip(items, chosen, strict=True))
    agreed = None
    if dense_chosen is not None:
        agreed = sum(mine == other for mine, other in zip(chosen, dense_chosen, strict=True))
    return Choosing(
        accuracy=right / num_items,
        accuracy_stderr=share_stderr(right, num_items),
        agreement=None if agreed is None else agreed / num_items,
        agreement_stderr=None if agreed is None else share_stderr(agreed, num_items),
        num_items=num_items,
        chance=1 / NUM_CHOICES,
    )


def share_stderr(count: int, total: int) -> float:
    """Return the standard error of the share ``count / total``, of independent items.

    That of Agresti and Coull, "Approximate is better than exact" (1998): the root of
    p (1 - p) / n with two successes and two failures added. So no share, 0 and 1 included, looks
    surer than so few items can make it.
    """
    n = total + 4
    p = (count + 2) / n
    return math.sqrt(p * (1 - p) / n)
