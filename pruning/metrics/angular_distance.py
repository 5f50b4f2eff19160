"""Angular distance between the streams before and after several consecutive layers.

Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, equation
7: with x_l the stream that layer l receives, of the last token of a text, ::

    d(l, l + n) = arccos(cos(x_l, x_{l + n})) / pi

and the n layers to leave out are those from the l where it is least on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pruning.metrics.base import Evidence, MetricError, Need, Ranking, needed_dense_pass
from pruning.metrics.names import ANGULAR_DISTANCE


@dataclass(frozen=True, slots=True)
class AngularDistance:
    """Ranks so that the first ``block_size`` layers to go are those of Gromov et al.

    Theirs is a choice for one number of layers; here one order serves all. The chosen block is
    exact. Of it, the layer at one end goes last, then again, so that what goes before is the
    better of two blocks that are shorter by one; beyond it, the block grows at the end where
    the distance grows less. A layer's score is the distance across the block with which it goes.

    ``block_size``: n; None: a quarter of the layers.
    """

    block_size: int | None = None

    name = ANGULAR_DISTANCE
    need = Need.DENSE_PASS

    def rank(self, evidence: Evidence) -> Ranking:
        """Return the ranking.

        Raises :class:`ValueError` for a block that the model has not, and :class:`MetricError`
        where the distances were not measured.
        """
        distances = needed_dense_pass(self, evidence).angular_distances
        if distances is None:
            raise MetricError(
                f"{self.name}: needs the streams of all layers in one process, which pipeline "
                "parallel does not give"
            )
        num_layers = evidence.num_layers
        size = max(num_layers // 4, 1) if self.block_size is None else self.block_size
        if not 1 <= size <= num_layers:
            raise ValueError(f"block_size: got {size}, allowed: 1 to {num_layers}")
        starts = range(num_layers - size + 1)
        # Of equal blocks the deeper one: fewer layers then work on what is left.
        start = min(starts, key=lambda layer: (distances[layer][layer + size], -layer))
        inner = _shrunk(distances, start, start + size)
        outer = _grown(distances, start, start + size)
        order = (*reversed(inner), *outer)
        scores = [0.0] * num_layers
        first = last = order[0]
        for layer in order:
            first, last = min(first, layer), max(last, layer)
            scores[layer] = distances[first][last + 1]
        return Ranking(order, tuple(scores))


def _shrunk(distances: Sequence[Sequence[float]], start: int, end: int) -> list[int]:
    """Return the layers of the block in the order in which it loses them at its ends."""
    lost = []
    while end - start > 1:
        if distances[start + 1][end] <= distances[start][end - 1]:
            lost.append(start)
            start += 1
        else:
            end -= 1
            lost.append(end)
    return [*lost, start]


def _grown(distances: Sequence[Sequence[float]], start: int, end: int) -> list[int]:
    """Return the layers outside the block in the order in which it takes them in."""
    num_layers = len(distances) - 1
    taken = []
    while end - start < num_layers:
        deeper = end < num_layers and (
            start == 0 or distances[start][end + 1] <= distances[start - 1][end]
        )
        if deeper:
            taken.append(end)
            end += 1
        else:
            start -= 1
            taken.append(start)
    return taken
