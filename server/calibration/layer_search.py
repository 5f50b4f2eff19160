"""Searches for the layers to leave out, in the engine that serves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pruning.metrics import BudgetSpent, Evidence, Metric, Ranking, RememberedLosses, Selection
from server.engine.base import Engine, LayerSelection, ProgressCallback
from server.errors import FailedPrecondition

# Selections measured at a time. Each time the dense model runs as well, and what was found is kept.
_SELECTIONS_AT_A_TIME = 8
# Greedy removal of half of the layers takes about as many passes over the text for each layer.
_PASSES_PER_LAYER = 5
_MIN_TEXT_TOKENS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loss:
    """The divergence from the dense model, in nats a token, without the layers ``skipped``."""

    skipped: Selection
    kl_nats: float


@dataclass(frozen=True, slots=True)
class SearchedLosses:
    """What searches have found, and the number of tokens that they ran for it."""

    num_tokens: int
    losses: tuple[Loss, ...]


class KeptSearch(Protocol):
    """Keeps what searches have found on one text, so that another search goes on from there."""

    def load(self) -> SearchedLosses | None: ...

    def save(self, searched: SearchedLosses) -> None: ...


def search_text_tokens(num_layers: int, max_tokens: int) -> int:
    """Return how much text a search that may run ``max_tokens`` in all compares layers on."""
    return max(max_tokens // (_PASSES_PER_LAYER * num_layers), _MIN_TEXT_TOKENS)


class LayerSearch:
    """Gives a metric the losses that it asks for, measured in the engine."""

    def __init__(
        self,
        engine: Engine,
        windows: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        repair: str | None,
        kept: KeptSearch | None,
        progress: ProgressCallback,
    ) -> None:
        """Compare layers on ``windows`` of token ids, two or more.

        ``max_tokens`` limits the tokens that the engine runs for it, those of an earlier search
        that is continued included. ``repair`` is the fingerprint of the maps that stand in for
        skipped layers.

        Raises :class:`FailedPrecondition`, naming ``search_tokens``, where it does not allow for
        a look at every layer.
        """
        self._engine = engine
        self._windows = windows
        self._text_tokens = sum(map(len, windows))
        self._num_layers = engine.model.num_layers
        self._max_tokens = max_tokens
        self._repair = repair
        self._kept = kept
        self._progress = progress
        groups = math.ceil(self._num_layers / _SELECTIONS_AT_A_TIME)
        needed = (self._num_layers + groups) * self._text_tokens
        if max_tokens < needed:
            raise FailedPrecondition(
                f"search_tokens: got {max_tokens}, allowed: {needed} or more, to look at each of "
                f"{self._num_layers} layers with {self._text_tokens} tokens of text"
            )
        self._expected_tokens = min(
            max_tokens, _PASSES_PER_LAYER * self._num_layers * self._text_tokens
        )
        found = None if kept is None else kept.load()
        self._num_tokens = 0 if found is None else found.num_tokens
        # Without any layer left out the model is the dense one.
        self._losses: dict[Selection, float] = {(): 0.0}
        if found is not None:
            self._losses |= {loss.skipped: loss.kl_nats for loss in found.losses}

    async def rank(self, metric: Metric) -> Ranking:
        """Return the ranking by ``metric``, which needs losses.

        Each time the metric asks for a loss that is not known, the loss is measured and the
        metric begins anew; what it has asked before costs nothing then. Cancelling the task ends
        the search, and what it has found is kept. Raises what
        :meth:`server.engine.base.Engine.measure_quality` does.
        """
        num_known = len(self._losses)
        is_spent = False
        while True:
            evaluate = RememberedLosses(
                _ask, losses=self._losses, max_evaluations=0 if is_spent else None
            )
            try:
                ranking = metric.rank(Evidence(self._num_layers, evaluate=evaluate))
                break
            except _Unknown as unknown:
                is_spent = not await self._measure(unknown.selections)
            except BudgetSpent:
                raise AssertionError("every layer can be looked at") from None
        self._progress(self._expected_tokens, self._expected_tokens)
        logger.info(
            "%s: %d selections of layers measured, %d known before%s",
            metric.name,
            len(self._losses) - num_known,
            num_known - 1,
            "; the search has used up search_tokens, and the remaining layers follow by what they "
            "cost when they were last measured"
            if is_spent
            else "",
        )
        return ranking

    async def _measure(self, selections: Sequence[Selection]) -> bool:
        """Measure the losses of ``selections``; return whether there were the tokens for it."""
        for start in range(0, len(selections), _SELECTIONS_AT_A_TIME):
            group = selections[start : start + _SELECTIONS_AT_A_TIME]
            num_tokens = (len(group) + 1) * self._text_tokens
            if self._num_tokens + num_tokens > self._max_tokens:
                return False
            qualities = await self._engine.measure_quality(
                self._windows,
                [LayerSelection(skipped, skipped, self._repair) for skipped in group],
                self._part_of_the_progress(num_tokens),
            )
            for skipped, quality in zip(group, qualities, strict=True):
                assert quality.kl_nats is not None, "the engine has been checked"
                self._losses[skipped] = quality.kl_nats
            self._num_tokens += num_tokens
            self._keep()
        return True

    def _part_of_the_progress(self, num_tokens: int) -> ProgressCallback:
        before = self._num_tokens

        def report(done: int, total: int) -> None:
            reached = before + num_tokens * done // total
            # The last step is reported when the metric asks for no more.
            self._progress(min(reached, self._expected_tokens - 1), self._expected_tokens)

        return report

    def _keep(self) -> None:
        if self._kept is not None:
            losses = tuple(Loss(*found) for found in self._losses.items() if found[0])
            self._kept.save(SearchedLosses(self._num_tokens, losses))


class _Unknown(Exception):
    """A metric has asked for losses that are not known."""

    def __init__(self, selections: Sequence[Selection]) -> None:
        self.selections = selections
        super().__init__()


def _ask(selections: Sequence[Selection]) -> Sequence[float]:
    raise _Unknown(selections)
