"""The fit of one map, against numpy's least squares."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pruning.repair import GramEstimator, RepairError, fit_map
from pruning.repair.fit import RIDGES
from pruning.repair.gram import LayerGram

HIDDEN = 8
Array = npt.NDArray[np.float64]


def pairs(num_tokens: int, seed: int = 0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a stream before and after a layer that is linear up to noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Directions of very unequal length, as in language models.
    x = normal(num_tokens, HIDDEN) * 10.0 ** torch.arange(HIDDEN).div(2)
    weight = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9)).double()
    return x, x + 0.1 * x @ weight + noise * normal(num_tokens, HIDDEN)


def gram(before: torch.Tensor, after: torch.Tensor, *cuts: int) -> LayerGram:
    estimator = GramEstimator([3])
    bounds = [0, *cuts, len(before)]
    for start, end in pairwise(bounds):
        estimator.update(3, before[start:end], after[start:end])
    sums = estimator.take(3)
    assert sums is not None
    return sums


def ridge_regression(before: torch.Tensor, after: torch.Tensor, ridge: float) -> Array:
    """Solve the regularized least squares by stacking sqrt(ridge) I below X."""
    x, added = before.numpy(), (after - before).numpy()
    scale = (x * x).sum(0).mean()
    stacked = np.vstack([x, math.sqrt(ridge * scale) * np.eye(HIDDEN)])
    target = np.vstack([added, np.zeros((HIDDEN, HIDDEN))])
    solution: Array = np.linalg.lstsq(stacked, target, rcond=None)[0]
    return solution


def unexplained(weight: Any, before: torch.Tensor, after: torch.Tensor) -> float:
    x, added = before.numpy(), (after - before).numpy()
    return float(((x @ weight - added) ** 2).sum() / (added**2).sum())


def test_is_the_least_squares_solution_with_the_best_ridge_of_the_grid() -> None:
    fit, held_out = pairs(40), pairs(30, seed=1)
    fitted = fit_map(3, gram(*fit, 7, 25), gram(*held_out))
    expected = ridge_regression(*fit, fitted.ridge)
    assert fitted.weight.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    by_ridge = {ridge: unexplained(ridge_regression(*fit, ridge), *held_out) for ridge in RIDGES}
    assert by_ridge[fitted.ridge] == pytest.approx(min(by_ridge.values()), rel=1e-6)
    assert fitted.unexplained == pytest.approx(by_ridge[fitted.ridge], rel=1e-6)


def test_what_is_linear_is_explained_whole() -> None:
    fitted = fit_map(3, gram(*pairs(40, noise=0)), gram(*pairs(30, seed=1, noise=0)))
    assert fitted.unexplained == pytest.approx(0, abs=1e-9)


def test_much_noise_asks_for_much_ridge() -> None:
    fitted = [
        fit_map(3, gram(*pairs(20, noise=noise)), gram(*pairs(400, seed=1, noise=noise)))
        for noise in (0.0, 3000.0)
    ]
    assert fitted[0].ridge < fitted[1].ridge
    assert fitted[1].unexplained < 1.05, "no worse than skipping"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-12)])
def test_states_of_other_types_are_summed_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    before, after = (states.to(dtype) for states in pairs(50))
    sums = gram(before, after, 10)
    x, y = before.double().numpy(), after.double().numpy()
    assert sums.gram.dtype == sums.cross.dtype == torch.float64
    assert sums.gram.numpy() == pytest.approx(x.T @ x, rel=tolerance)
    assert sums.cross.numpy() == pytest.approx(x.T @ (y - x), rel=tolerance, abs=1e-6)
    assert float(sums.energy) == pytest.approx(((y - x) ** 2).sum(), rel=tolerance)


def test_only_layers_of_the_group_are_summed() -> None:
    estimator = GramEstimator([0, 2])
    for layer in range(3):
        estimator.update(layer, *pairs(5))
    assert estimator.take(1) is None
    assert estimator.take(2) is not None
    assert estimator.take(2) is None, "taken"


def test_updates_read_nothing_back_from_the_device() -> None:
    states = torch.empty(8, 4, device="meta")
    estimator = GramEstimator([0])
    estimator.update(0, states, states)
    estimator.update(0, states, states)


def test_too_little_text_says_how_much_is_needed() -> None:
    message = "text: got 15 tokens to fit repair on, allowed: 16 or more, 2 for each of the 8"
    with pytest.raises(RepairError, match=re.escape(message)):
        fit_map(3, gram(*pairs(15)), gram(*pairs(5)))
    with pytest.raises(RepairError, match="layer 3: no tokens were measured"):
        fit_map(3, gram(*pairs(20)), None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("damaged", [0, 1])
def test_states_that_are_not_finite_are_refused(value: float, damaged: int) -> None:
    both = [pairs(20), pairs(20, seed=1)]
    both[damaged][1][3, 2] = value
    with pytest.raises(RepairError, match="layer 3: the fit of its repair is not finite: among"):
        fit_map(3, gram(*both[0]), gram(*both[1]))


def test_a_layer_that_does_nothing_has_nothing_to_fit() -> None:
    before, _ = pairs(20)
    with pytest.raises(RepairError, match="layer 3: there is nothing to fit"):
        fit_map(3, gram(before, before), gram(before, before))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \[5, 8\] and \[4, 8\]"):
        GramEstimator([0]).update(0, torch.ones(5, 8), torch.ones(4, 8))
