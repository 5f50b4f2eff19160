"""The closed-form fit of one layer's map.

With X the stream before the layer and D what the layer adds, both on the dense model, ::

    M = argmin |X M - D|^2 + ridge |M|^2 = (X^T X + ridge I)^-1 X^T D

as ReplaceMe (arXiv 2505.02819) fits one map for one cut. The ridge is chosen on tokens that the
fit did not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pruning.repair.errors import RepairError
from pruning.repair.gram import LayerGram

if TYPE_CHECKING:
    import torch

# Relative to the mean square of a stream's element. From no ridge that matters in float64 to one
# that leaves nearly nothing of the map.
RIDGES = tuple(10.0**exponent for exponent in range(-10, 3))
# A map has hidden unknowns for each of its outputs.
_TOKENS_PER_UNKNOWN = 2


@dataclass(frozen=True, slots=True)
class FittedMap:
    """A map, float64 [hidden, hidden], and how it was fitted.

    ``ridge`` is relative to the mean of the diagonal of X^T X. ``unexplained`` is
    |X M - D|^2 / |D|^2 on the held-out tokens: 0 where the map does all that the layer does, 1
    where it is no better than skipping.
    """

    weight: torch.Tensor
    ridge: float
    unexplained: float


def min_fit_tokens(hidden_size: int) -> int:
    """Return how many tokens a map of ``hidden_size`` must be fitted on, at least."""
    return _TOKENS_PER_UNKNOWN * hidden_size


def check_fit_tokens(num_tokens: int, hidden_size: int) -> None:
    """Raise :class:`RepairError` for fewer tokens than :func:`min_fit_tokens` says."""
    if num_tokens < min_fit_tokens(hidden_size):
        raise RepairError(
            f"text: got {num_tokens} tokens to fit repair on, allowed: "
            f"{min_fit_tokens(hidden_size)} or more, {_TOKENS_PER_UNKNOWN} for each of the "
            f"{hidden_size} elements of the residual stream"
        )


def fit_map(layer: int, fit: LayerGram | None, held_out: LayerGram | None) -> FittedMap:
    """Return the map of ``layer`` with the ridge that leaves least unexplained of ``held_out``.

    Raises :class:`RepairError` for fewer tokens to fit on than :func:`min_fit_tokens` says, for
    none held out, and for sums that are not finite.
    """
    import torch

    if fit is None or held_out is None:
        raise RepairError(f"layer {layer}: no tokens were measured")
    hidden_size = len(fit.gram)
    check_fit_tokens(fit.num_tokens, hidden_size)
    for sums in (fit, held_out):
        if not all(bool(part.isfinite().all()) for part in (sums.gram, sums.cross, sums.energy)):
            raise RepairError(
                f"layer {layer}: the fit of its repair is not finite: among the states of "
                f"{sums.num_tokens} tokens is a NaN or an infinity"
            )
    scale = fit.gram.diagonal().mean()
    if not scale > 0 or not held_out.energy > 0:
        raise RepairError(f"layer {layer}: there is nothing to fit: its states are all zero")
    # One decomposition serves all ridges. Rounding may leave an eigenvalue just below zero.
    eigenvalues, basis = torch.linalg.eigh(fit.gram / scale)
    eigenvalues = eigenvalues.clamp(min=0)
    cross = basis.mT @ (fit.cross / scale)
    gram = basis.mT @ held_out.gram @ basis
    target = basis.mT @ held_out.cross
    best: tuple[float, float, torch.Tensor] | None = None
    for ridge in RIDGES:
        rotated = cross / (eigenvalues + ridge)[:, None]
        squares = (rotated * (gram @ rotated - 2 * target)).sum() + held_out.energy
        unexplained = float(squares / held_out.energy)
        if best is None or unexplained < best[0]:
            best = unexplained, ridge, rotated
    assert best is not None
    unexplained, ridge, rotated = best
    return FittedMap(basis @ rotated, ridge, unexplained)
