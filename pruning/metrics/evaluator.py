"""What is lost without some layers: the evaluator that searches are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

# Layers that are left out, ascending.
Selection = tuple[int, ...]
# The losses of selections, in nats a token, each compared with the dense model (a KL divergence)
# or not (a negative log-likelihood). Where skipped layers are repaired, it repairs them.
Evaluate = Callable[[Sequence[Selection]], Sequence[float]]


class BudgetSpent(Exception):
    """An evaluator may evaluate no more; a search ends with what it knows."""


class RememberedLosses:
    """An evaluator that evaluates no selection twice, and a limited number of new ones.

    ``losses`` are those of an earlier search, to go on where it was interrupted.
    ``on_evaluated`` is called after each evaluation with all losses so far: to keep them, and
    to report progress.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        losses: Mapping[Selection, float] | None = None,
        max_evaluations: int | None = None,
        on_evaluated: Callable[[Mapping[Selection, float]], None] | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._losses = dict(losses or {})
        self._remaining = math.inf if max_evaluations is None else max_evaluations
        self._on_evaluated = on_evaluated

    @property
    def losses(self) -> Mapping[Selection, float]:
        return self._losses

    def __call__(self, selections: Sequence[Selection]) -> list[float]:
        """Return the loss of each selection.

        Raises:
            BudgetSpent: more of them are new than may still be evaluated; none was.
            ValueError: the evaluator gave another number of losses, or one that is not finite.
        """
        new = list(dict.fromkeys(s for s in selections if s not in self._losses))
        if len(new) > self._remaining:
            raise BudgetSpent
        if new:
            losses = self._evaluate(new)
            self._remaining -= len(new)
            for selection, loss in zip(new, losses, strict=True):
                if not math.isfinite(loss):
                    raise ValueError(
                        f"loss: got {loss} without the layers {list(selection)}, allowed: "
                        "finite numbers"
                    )
                self._losses[selection] = loss
            if self._on_evaluated is not None:
                self._on_evaluated(self._losses)
        return [self._losses[selection] for selection in selections]
