from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pruning import quality
from pruning.quality import (
    QualityError,
    paired_statistics,
    quality_of_windows,
    token_statistics,
)

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(40, 11, generator=generator)
    logits = reference + torch.randn(40, 11, generator=generator)
    return logits, reference, torch.randint(11, (40,), generator=generator)


def test_agrees_with_the_definitions(case: Case) -> None:
    logits, reference, targets = (part.numpy() for part in case)

    def log_softmax(logits: Any) -> npt.NDArray[np.float64]:
        x: npt.NDArray[np.float64] = logits.astype(np.float64)
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        return x

    p, q = log_softmax(reference), log_softmax(logits)
    expected = [
        40,
        -q[np.arange(40), targets].sum(),
        (logits.argmax(-1) == reference.argmax(-1)).sum(),
        (np.exp(p) * (p - q)).sum(),
    ]
    statistics = token_statistics(*case)
    assert statistics.dtype == torch.float64
    assert 0 < expected[2] < 40
    assert statistics.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_reference_itself_agrees_fully(case: Case) -> None:
    _, reference, targets = case
    num_tokens, _, agreements, divergence = token_statistics(reference, reference, targets).tolist()
    assert (num_tokens, agreements, divergence) == (40, 40, 0)


def test_chunks_do_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = token_statistics(*case).tolist()
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", 30)
    assert token_statistics(*case).tolist() == pytest.approx(whole, rel=1e-7)


def test_tokens_that_both_rule_out_do_not_matter(case: Case) -> None:
    logits, reference, targets = case
    ruled_out = torch.full((40, 3), -math.inf)
    widened, reference = (torch.cat([x, ruled_out], -1) for x in (logits, reference))
    assert token_statistics(widened, reference, targets).tolist() == pytest.approx(
        token_statistics(*case).tolist(), rel=1e-7
    )


def test_statistics_read_nothing_back_from_the_device() -> None:
    logits, targets = torch.empty(6, 5, device="meta"), torch.empty(6, device="meta").long()
    assert token_statistics(logits, logits, targets).shape == (4,)


def test_refuses_shapes_that_do_not_fit(case: Case) -> None:
    logits, reference, targets = case
    with pytest.raises(ValueError, match=r"got shapes \[40, 11\] and \[39, 11\]"):
        token_statistics(logits, reference[1:], targets)
    with pytest.raises(ValueError, match=r"targets: got shape \[39\], allowed: \[40\]"):
        token_statistics(logits, reference, targets[1:])


def test_quality_of_windows_by_hand() -> None:
    measured = quality_of_windows([[2, 2.0, 1, 0.5], [2, 4.0, 2, 0.1], [4, 6.0, 3, 0.2]])
    # r = 12 / 8; the residuals x - r * n are -1, 1, 0.
    assert measured.perplexity == math.exp(1.5)
    assert measured.perplexity_stderr == pytest.approx(math.exp(1.5) * math.sqrt(3 / 2 * 2) / 8)
    assert measured.agreement == 6 / 8
    assert measured.kl_nats == pytest.approx(0.1)
    assert measured.num_tokens == 8


def test_standard_error_is_the_spread_of_repeated_measurements() -> None:
    rng = np.random.default_rng(0)

    def sample() -> list[list[float]]:
        lengths = rng.integers(5, 30, size=60)
        difficulty = rng.normal(2, 0.3, size=60)
        return [
            [n, rng.normal(d, 0.5, size=n).sum(), 0, 0]
            for n, d in zip(lengths, difficulty, strict=True)
        ]

    measured = [quality_of_windows(sample()) for _ in range(400)]
    spread = np.std([m.perplexity for m in measured], ddof=1)
    assert np.mean([m.perplexity_stderr for m in measured]) == pytest.approx(spread, rel=0.1)


def test_the_reference_has_a_loss_of_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reference, targets = case
    expected = token_statistics(reference, reference, targets)[1].item()
    statistics = paired_statistics(*case).tolist()
    assert statistics[:4] == token_statistics(*case).tolist()
    assert statistics[4] == pytest.approx(expected, rel=1e-7)
    monkeypatch.setattr(quality, "_CHUNK_ELEMENTS", 30)
    assert paired_statistics(*case).tolist() == pytest.approx(statistics, rel=1e-7)


def test_standard_error_of_the_ratio_by_hand() -> None:
    measured = quality_of_windows(
        [[2, 2.0, 1, 0.5, 1.0], [2, 4.0, 2, 0.1, 2.5], [4, 6.0, 3, 0.2, 4.5]]
    )
    # ln of the ratio is 4 / 8; the residuals (x - y) - 0.5 * n are 0, 0.5, -0.5.
    assert measured.log_ratio_stderr == pytest.approx(math.sqrt(3 / 2 * 0.5) / 8)
    unpaired = quality_of_windows([[2, 2.0, 1, 0.5], [2, 4.0, 2, 0.1], [4, 6.0, 3, 0.2]])
    assert unpaired.log_ratio_stderr is None
    assert replace(measured, log_ratio_stderr=None) == unpaired


def test_standard_error_of_the_ratio_is_the_spread_of_repeated_measurements() -> None:
    """Windows differ far more than what pruning costs in each of them."""
    rng = np.random.default_rng(0)

    def sample() -> list[list[float]]:
        lengths = rng.integers(5, 30, size=60)
        difficulty = rng.normal(2, 0.6, size=60)
        return [
            [n, n * (d + rng.normal(0.2, 0.1)), 0, 0, n * d]
            for n, d in zip(lengths, difficulty, strict=True)
        ]

    samples = [sample() for _ in range(400)]
    measured = [quality_of_windows(each) for each in samples]
    references = [quality_of_windows([[w[0], w[4], 0, 0] for w in each]) for each in samples]
    ratios = [
        math.log(m.perplexity / r.perplexity) for m, r in zip(measured, references, strict=True)
    ]
    stderr = float(np.mean([m.log_ratio_stderr for m in measured]))
    assert stderr == pytest.approx(np.std(ratios, ddof=1), rel=0.1)
    assert stderr < 0.25 * np.mean([m.perplexity_stderr / m.perplexity for m in measured])


def test_windows_of_equal_perplexity_have_no_error() -> None:
    measured = quality_of_windows([[3, 6.0, 0, 0.0]] * 4)
    assert measured.perplexity_stderr == 0


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    measured = quality_of_windows([[1, 800.0, 0, 800.0], [1, 900.0, 0, 900.0]])
    assert measured.perplexity == math.inf
    assert measured.kl_nats == 850


@pytest.mark.parametrize("num_windows", [0, 1])
def test_refuses_too_few_windows(num_windows: int) -> None:
    with pytest.raises(QualityError, match=f"got {num_windows} text windows, allowed: 2 or more"):
        quality_of_windows([[2, 2.0, 1, 0.5]] * num_windows)


def test_refuses_windows_without_meaning() -> None:
    good = [2, 2.0, 1, 0.5]
    with pytest.raises(QualityError, match="window 1: got no tokens"):
        quality_of_windows([good, [0, 0.0, 0, 0.0]])
    for value in (math.nan, math.inf):
        with pytest.raises(QualityError, match=r"window 2: .* not finite"):
            quality_of_windows([good, good, [2, value, 1, 0.5]])


def test_logits_that_are_nan_are_refused(case: Case) -> None:
    logits, reference, targets = case
    sums = [token_statistics(logits, reference, targets).tolist()]
    logits[7, 3] = math.nan
    sums.append(token_statistics(logits, reference, targets).tolist())
    with pytest.raises(QualityError, match=r"window 1: .* not finite"):
        quality_of_windows(sums)
