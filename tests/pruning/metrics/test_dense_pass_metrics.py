"""The metrics that rank by a dense pass, against their definitions in numpy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from pruning.layer_means import ImportanceError
from pruning.metrics import (
    METRICS,
    AngularDistance,
    DensePass,
    DensePassEstimator,
    Evidence,
    MetricError,
    measure_dense_pass,
)
from tests.pruning.metrics.subjects import Subject

DENSE = ("block_influence", "relative_magnitude", "norm", "angular_distance")


def measured(subject: Subject) -> DensePass:
    # In two batches, so that something has to be added up.
    return measure_dense_pass(subject.model, subject.input_ids.split(4))


def evidence(subject: Subject) -> Evidence:
    return Evidence(subject.num_layers, measured(subject))


def distances(subject: Subject) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The angular distance of every two streams, last tokens alone, one pair at a time."""
    streams = [stream[:, -1] for stream in subject.streams]
    table = np.zeros((len(streams), len(streams)))
    for i, a in enumerate(streams):
        for j, b in enumerate(streams):
            cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            table[i, j] = (np.arccos(np.clip(cosines, -1, 1)) / math.pi).mean()
    return table


def test_block_influence(subject: Subject) -> None:
    expected = [
        1 - ((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)).mean()
        for x, y in pairwise(subject.streams)
    ]
    ranking = METRICS["block_influence"].rank(evidence(subject))
    assert ranking.scores == pytest.approx(expected, rel=1e-9)
    assert ranking.removal_order == tuple(np.argsort(expected))


def test_relative_magnitude(subject: Subject) -> None:
    expected = [
        (np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1)).mean()
        for x, y in pairwise(subject.streams)
    ]
    ranking = METRICS["relative_magnitude"].rank(evidence(subject))
    assert ranking.scores == pytest.approx(expected, rel=1e-9)
    assert ranking.removal_order == tuple(np.argsort(expected))


def test_norm(subject: Subject) -> None:
    expected = [np.linalg.norm(y, axis=-1).mean() for y in subject.streams[1:]]
    ranking = METRICS["norm"].rank(evidence(subject))
    assert [-score for score in ranking.scores] == pytest.approx(expected, rel=1e-9)
    assert ranking.removal_order == tuple(np.argsort(expected)[::-1])


def test_angular_distances(subject: Subject) -> None:
    dense_pass = measured(subject)
    assert dense_pass.num_texts == len(subject.input_ids)
    # The arc cosine is steep where the streams are nearly one.
    assert np.array(dense_pass.angular_distances) == pytest.approx(distances(subject), abs=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_block_of_angular_distance_is_that_of_its_definition(
    subject: Subject, size: int
) -> None:
    table, num_layers = distances(subject), subject.num_layers
    start = min(range(num_layers - size + 1), key=lambda layer: table[layer, layer + size])
    ranking = AngularDistance(size).rank(evidence(subject))
    assert set(ranking.removal_order[:size]) == set(range(start, start + size))
    for count in range(1, num_layers + 1):
        removed = sorted(ranking.removal_order[:count])
        assert removed == list(range(removed[0], removed[0] + count)), "a block at every depth"
        newest = ranking.removal_order[count - 1]
        assert ranking.scores[newest] == pytest.approx(
            table[removed[0], removed[0] + count], abs=1e-7
        )


def test_angular_distance_shrinks_and_grows_at_the_better_end() -> None:
    # By hand: d(l, m) over five layers.
    table = [[0.0] * 6 for _ in range(6)]
    for (first, end), value in {
        (1, 4): 0.1,  # the block
        (0, 3): 0.2,
        (2, 5): 0.3,
        (1, 3): 0.05,  # shorter by its last layer
        (2, 4): 0.06,
        (1, 2): 0.04,
        (2, 3): 0.03,  # shorter by its first layer
        (0, 4): 0.4,
        (1, 5): 0.35,  # longer by layer 4
        (0, 5): 0.5,
    }.items():
        table[first][end] = table[end][first] = value
    dense_pass = DensePass(None, None, None, tuple(map(tuple, table)), 1)  # type: ignore[arg-type]
    ranking = AngularDistance(3).rank(Evidence(5, dense_pass))
    assert ranking.removal_order == (2, 1, 3, 4, 0)
    assert ranking.scores == (0.5, 0.05, 0.03, 0.1, 0.35)


def test_orders_that_know_only_the_position() -> None:
    nothing = Evidence(4)
    assert METRICS["sequential"].rank(nothing).removal_order == (0, 1, 2, 3)
    assert METRICS["sequential"].rank(nothing).scores == (0.0, 1.0, 2.0, 3.0)
    assert METRICS["reverse_order"].rank(nothing).removal_order == (3, 2, 1, 0)
    assert METRICS["reverse_order"].rank(nothing).scores == (3.0, 2.0, 1.0, 0.0)


def test_padding_is_not_counted(random_subject: Subject) -> None:
    model = random_subject.model
    rows = [random_subject.input_ids[:1, :length] for length in (7, 24, 13)]
    padded, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    for row, ids in enumerate(rows):
        padded[row, : ids.shape[1]], mask[row, : ids.shape[1]] = ids[0], 1
    alone = measure_dense_pass(model, rows)
    together = measure_dense_pass(model, [padded], [mask])
    assert together.num_texts == alone.num_texts == 3
    assert together.norm.num_tokens == alone.norm.num_tokens == 7 + 24 + 13
    assert together.relative_magnitude.means == pytest.approx(
        alone.relative_magnitude.means, rel=1e-9
    )
    assert np.array(together.angular_distances) == pytest.approx(
        np.array(alone.angular_distances), abs=1e-7
    )


@pytest.mark.parametrize("name", DENSE)
def test_without_a_dense_pass_the_metric_says_so(name: str) -> None:
    with pytest.raises(MetricError, match=f"{name}: needs what was measured in a dense pass"):
        METRICS[name].rank(Evidence(4))


def test_a_block_that_the_model_has_not_is_refused(random_subject: Subject) -> None:
    with pytest.raises(ValueError, match="block_size: got 7, allowed: 1 to 6"):
        AngularDistance(7).rank(evidence(random_subject))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    estimator = DensePassEstimator(2)
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    damaged = states.clone()
    damaged[1, 3] = value
    last = torch.tensor([4])
    estimator.update(0, states, states + 1, last)
    estimator.update(1, states + 1, damaged, last)
    with pytest.raises(ImportanceError, match="layer 1: the block influence is not finite"):
        estimator.result()


def test_without_last_tokens_there_are_no_angles() -> None:
    estimator = DensePassEstimator(1)
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    estimator.update(0, states, states + 1, torch.tensor([], dtype=torch.long))
    with pytest.raises(ImportanceError, match="no last token of a text was measured"):
        estimator.result()
