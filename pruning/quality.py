"""Quality of a pruned model: perplexity, and agreement with and divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.decoder import StandIn, find_decoder, inference_options, without_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

# Limits each temporary tensor of a chunk of tokens to some 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


class QualityError(ValueError):
    """Measured sums from which no quality can be computed."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of a pruned model, measured on ``num_tokens`` tokens of held-out text.

    ``perplexity`` is per token. ``agreement`` is the share of tokens at which the most likely
    next token is that of the dense model. ``kl_nats`` is the mean divergence KL(dense || pruned)
    of the next-token distributions, in nats. ``log_ratio_stderr`` is the standard error of
    ln(perplexity / perplexity of the dense model). Those three are None if they were not measured.
    """

    perplexity: float
    perplexity_stderr: float
    agreement: float | None
    kl_nats: float | None
    num_tokens: int
    log_ratio_stderr: float | None = None


def token_statistics(
    logits: torch.Tensor, reference_logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the first four of :func:`paired_statistics`, float64 [4]."""
    return paired_statistics(logits, reference_logits, targets)[:4]


def paired_statistics(
    logits: torch.Tensor, reference_logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the statistics of one text window, float64 [5].

    They are the number of tokens T, the sum of the negative log-likelihood of ``targets`` in nats,
    the number of tokens at which both argmaxes are equal, the sum of KL(reference || logits) in
    nats, and the reference's own sum of the negative log-likelihood. ``logits`` and
    ``reference_logits`` are [T, V], ``targets`` is [T]. Log-probabilities are computed in float32
    and summed in float64. The call does not wait for the device.
    """
    import torch

    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits, reference_logits: got shapes {list(logits.shape)} and "
            f"{list(reference_logits.shape)}, allowed: equal shapes [num_tokens, vocabulary]"
        )
    num_tokens, vocab_size = logits.shape
    if targets.shape != (num_tokens,):
        raise ValueError(f"targets: got shape {list(targets.shape)}, allowed: [{num_tokens}]")
    statistics = torch.zeros(5, dtype=torch.float64, device=logits.device)
    with torch.no_grad():
        chunk = max(_CHUNK_ELEMENTS // max(vocab_size, 1), 1)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            logprobs = logits[rows].float().log_softmax(-1)
            reference = reference_logits[rows].float().log_softmax(-1)
            nll, reference_nll = (
                -each.gather(-1, targets[rows, None]) for each in (logprobs, reference)
            )
            agreements = logits[rows].argmax(-1) == reference_logits[rows].argmax(-1)
            # A token with probability 0 in the reference adds nothing, even if it is 0 in both.
            divergence = torch.where(
                reference.isneginf(), 0.0, reference.exp() * (reference - logprobs)
            )
            sums = (nll, agreements, divergence.sum(-1), reference_nll)
            statistics[1:] += torch.stack([part.double().sum() for part in sums])
    statistics[0] = num_tokens
    return statistics


def quality_of_windows(sums: Sequence[Sequence[float | None]]) -> Quality:
    """Return the quality over text windows, given the :func:`token_statistics` of each.

    The number of agreements and the divergence are None if they were not measured. With a fifth
    sum, the reference's loss as in :func:`paired_statistics`, the ratio to the reference has a
    standard error, too.

    Tokens of one window are not independent, but windows nearly are, so the windows are the sample
    of the standard error. With x the negative log-likelihood of a window and n its number of
    tokens, the mean r = sum(x) / sum(n) is a ratio estimator over m windows. Its variance is
    m / (m - 1) * sum((x - r * n) ** 2) / sum(n) ** 2 (Cochran, "Sampling Techniques", 3rd
    edition, chapter 6). By the delta method, the standard error of the perplexity exp(r) is
    exp(r) * sqrt(variance). A perplexity beyond the range of a float is infinite. The logarithm of
    its ratio to the perplexity of the reference is such a mean as well, of x minus the reference's
    loss in the same window; as a window is hard for both, its standard error is far smaller.

    Raises :class:`QualityError` for fewer than two windows, which have no variance, for a window
    without tokens, and for a sum that is not finite.
    """
    if len(sums) < 2:
        raise QualityError(
            f"got {len(sums)} text windows, allowed: 2 or more, for a standard error"
        )
    for window, statistics in enumerate(sums):
        if not all(math.isfinite(value) for value in statistics if value is not None):
            raise QualityError(f"window {window}: the logits gave a sum that is not finite")
    sizes = [_measured(statistics[0]) for statistics in sums]
    losses = [_measured(statistics[1]) for statistics in sums]
    for window, size in enumerate(sizes):
        if size < 1:
            raise QualityError(f"window {window}: got no tokens, allowed: 1 or more")
    num_tokens = math.fsum(sizes)
    mean_nll, stderr = _mean_and_stderr(losses, sizes)
    log_ratio_stderr = None
    if all(len(statistics) > 4 for statistics in sums):
        references = [_measured(statistics[4]) for statistics in sums]
        differences = [x - y for x, y in zip(losses, references, strict=True)]
        _, log_ratio_stderr = _mean_and_stderr(differences, sizes)
    try:
        perplexity = math.exp(mean_nll)
    except OverflowError:
        perplexity = math.inf
    return Quality(
        perplexity=perplexity,
        perplexity_stderr=perplexity * stderr,
        agreement=_mean([statistics[2] for statistics in sums], num_tokens),
        kl_nats=_mean([statistics[3] for statistics in sums], num_tokens),
        num_tokens=int(num_tokens),
        log_ratio_stderr=log_ratio_stderr,
    )


def _mean_and_stderr(losses: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the ratio estimate sum(losses) / sum(sizes), and its standard error."""
    num_tokens = math.fsum(sizes)
    mean = math.fsum(losses) / num_tokens
    squares = math.fsum((x - mean * n) ** 2 for n, x in zip(sizes, losses, strict=True))
    return mean, math.sqrt(len(sizes) / (len(sizes) - 1) * squares) / num_tokens


def _measured(value: float | None) -> float:
    if value is None:
        raise QualityError("a number of tokens or a negative log-likelihood is missing")
    return value


def _mean(sums: Sequence[float | None], num_tokens: float) -> float | None:
    measured = [value for value in sums if value is not None]
    return math.fsum(measured) / num_tokens if len(measured) == len(sums) else None


def measure_quality(
    model: nn.Module,
    windows: Iterable[torch.Tensor],
    skipped: Sequence[Collection[int]],
    layers: Sequence[nn.Module] | None = None,
    stand_ins: Mapping[int, StandIn] | None = None,
) -> list[Quality]:
    """Measure the quality of a transformers model without some of its layers.

    Returns a quality for each set of layers in ``skipped``; :meth:`pruning.plan.Plan.skipped`
    returns the set of a depth. ``windows`` are the token ids of two or more pieces of text,
    [length] each; all tokens but the first of each are predicted. ``model`` must return logits. By
    default, ``layers`` are those that :func:`pruning.decoder.find_decoder` finds. ``stand_ins``
    are what skipped layers do instead, as in :func:`pruning.decoder.without_layers`. The logits of
    one window at a time are in memory.

    Raises :class:`ValueError` for a model in training mode, for one whose layers cannot be found
    and for layers that it does not have, and :class:`QualityError` as
    :func:`quality_of_windows` does.
    """
    import torch

    options = inference_options(model)
    found = find_decoder(model, layers).layers
    sums: list[list[list[float]]] = [[] for _ in skipped]
    with torch.inference_mode():
        for window in windows:
            reference = next_token_logits(model, window, options)
            for of_selection, selection in zip(sums, skipped, strict=True):
                with without_layers(found, selection, stand_ins) if selection else nullcontext():
                    logits = next_token_logits(model, window, options)
                of_selection.append(paired_statistics(logits, reference, window[1:]).tolist())
    return [quality_of_windows(of_selection) for of_selection in sums]


def next_token_logits(
    model: nn.Module, window: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Return the logits [length - 1, vocabulary] of all tokens but the first.

    ``options`` are those of :func:`pruning.decoder.inference_options`. Raises :class:`ValueError`
    for a model that returns no logits.
    """
    output = model(input_ids=window[None], **options)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"model: {type(model).__name__} returned {type(output).__name__} without logits, "
            "allowed: models with a language-modeling head"
        )
    of_window: torch.Tensor = logits[0, :-1]
    return of_window
