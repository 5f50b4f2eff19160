"""Writing: what a pruned model generates, as the dense model sees it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.probes.repetition import repeated_share


@dataclass(frozen=True, slots=True)
class Continuations:
    """Greedy continuations of the same prompts at one depth.

    ``losses`` has the negative log-likelihood of each under the dense model, in nats, given its
    prompt; None where there is no dense model.
    """

    token_ids: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Writing:
    """How a pruned model writes, measured on ``num_prompts`` prompts of held-out text.

    ``perplexity`` is that of its greedy continuations under the dense model, per token, and
    ``dense_perplexity`` that of the dense model's own. ``ratio`` is the first divided by the
    second. A text that repeats itself has a low perplexity, so ``repeated_share`` belongs to it:
    the mean share of 4-grams that have occurred before in the same continuation, beside the dense
    model's own. ``first_token_changed`` is the share of prompts that the dense model continues
    with another token. What needs the dense model is None where there is none.
    """

    perplexity: float | None
    dense_perplexity: float | None
    ratio: float | None
    ratio_stderr: float | None
    repeated_share: float
    dense_repeated_share: float | None
    first_token_changed: float | None
    num_prompts: int
    num_tokens: int
    # Of the difference between the two shares of repetition, over the prompts.
    repeated_stderr: float | None = None

    @property
    def loss(self) -> tuple[float, float] | None:
        """What is lost in writing, in nats, and its standard error; None without a dense model.

        The logarithm of ``ratio`` and the repetition beyond the dense model's own are added, each
        only as far as it is a loss: text that repeats itself is easy to predict, so a low ratio
        must not make up for loops. The standard error takes the two for independent.
        """
        if self.ratio is None or self.dense_repeated_share is None:
            return None
        log_ratio = math.log(self.ratio) if self.ratio > 0 else -math.inf
        repeated = self.repeated_share - self.dense_repeated_share
        relative = 0.0
        if self.ratio_stderr is not None and 0 < self.ratio < math.inf:
            relative = self.ratio_stderr / self.ratio
        loss = max(log_ratio, 0.0) + max(repeated, 0.0)
        return loss, math.hypot(relative, self.repeated_stderr or 0.0)


def writing(level: Continuations, dense: Continuations | None) -> Writing:
    """Return how ``level`` writes, compared with ``dense`` on the same prompts.

    Prompts are the sample of the standard error. With x the loss of a continuation of n tokens at
    the level, and y and m those of the dense model's, the logarithm of the ratio is the difference
    of two ratio estimators, A = sum(x) / sum(n) less B = sum(y) / sum(m). Its variance over k
    prompts is k / (k - 1) * sum(((x - A n) / sum(n) - (y - B m) / sum(m)) ** 2) (Cochran,
    "Sampling Techniques", 3rd edition, chapter 6): what makes a prompt hard for both depths
    cancels. By the delta method, the standard error of the ratio is ratio * sqrt(variance). A
    perplexity or a ratio beyond the range of a float is infinite.

    Raises :class:`ValueError` for fewer than two prompts, an empty continuation, and losses or
    dense continuations that are not one for each.
    """
    num_prompts = len(level.token_ids)
    if num_prompts < 2:
        raise ValueError(f"level: got {num_prompts} continuations, allowed: 2 or more")
    for name, each in (("level", level), ("dense", dense)):
        if each is not None:
            _check(name, each, num_prompts)
    ratio = stderr = None
    own = _loss_per_token(level)
    reference = None if dense is None else _loss_per_token(dense)
    if dense is not None and own is not None and reference is not None:
        mine, others = _influences(level, own), _influences(dense, reference)
        squares = math.fsum((a - b) ** 2 for a, b in zip(mine, others, strict=True))
        ratio = _exp(own - reference)
        stderr = ratio * math.sqrt(num_prompts / (num_prompts - 1) * squares)
    first_token_changed = None
    if dense is not None:
        pairs = zip(level.token_ids, dense.token_ids, strict=True)
        first_token_changed = sum(a[0] != b[0] for a, b in pairs) / num_prompts
    return Writing(
        perplexity=None if own is None else _exp(own),
        dense_perplexity=None if reference is None else _exp(reference),
        ratio=ratio,
        ratio_stderr=stderr,
        repeated_share=_mean_repeated_share(level),
        dense_repeated_share=None if dense is None else _mean_repeated_share(dense),
        first_token_changed=first_token_changed,
        num_prompts=num_prompts,
        num_tokens=sum(map(len, level.token_ids)),
        repeated_stderr=None if dense is None else _repeated_stderr(level, dense),
    )


def _check(name: str, continuations: Continuations, num_prompts: int) -> None:
    token_ids, losses = continuations.token_ids, continuations.losses
    if len(token_ids) != num_prompts or (losses is not None and len(losses) != num_prompts):
        raise ValueError(
            f"{name}: got {len(token_ids)} continuations and "
            f"{'no' if losses is None else len(losses)} losses, allowed: {num_prompts}, one for "
            "each prompt"
        )
    if not all(token_ids):
        raise ValueError(f"{name}: got a continuation without tokens, allowed: 1 or more")


def _loss_per_token(continuations: Continuations) -> float | None:
    if continuations.losses is None:
        return None
    return math.fsum(continuations.losses) / sum(map(len, continuations.token_ids))


def _influences(continuations: Continuations, mean: float) -> list[float]:
    """Return how much each continuation moves the mean loss per token."""
    assert continuations.losses is not None
    lengths: Sequence[int] = list(map(len, continuations.token_ids))
    pairs = zip(continuations.losses, lengths, strict=True)
    return [(loss - mean * length) / sum(lengths) for loss, length in pairs]


def _mean_repeated_share(continuations: Continuations) -> float:
    shares = [repeated_share(token_ids) for token_ids in continuations.token_ids]
    return math.fsum(shares) / len(shares)


def _repeated_stderr(level: Continuations, dense: Continuations) -> float:
    differences = [
        repeated_share(mine) - repeated_share(other)
        for mine, other in zip(level.token_ids, dense.token_ids, strict=True)
    ]
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
