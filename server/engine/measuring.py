"""Checks of texts to measure on, and of the results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pruning.quality import Quality, quality_of_windows
from server.engine.base import ModelInfo
from server.errors import InvalidArgument, NonFiniteResult

# Token ids.
Window = Sequence[int]

# Windows whose importance is added up separately, unless there are more of them than that.
_MAX_GROUPS = 64
# After so many groups a measurement of importance may end.
_GROUPS_AT_A_TIME = 16


def importance_parts(windows: Sequence[Window]) -> Iterator[list[Sequence[Window]]]:
    """Yield the groups of windows whose importance is added up separately, some at a time.

    A group is one window, or several neighbours where there are more than ``_MAX_GROUPS`` windows.
    """
    size = math.ceil(len(windows) / _MAX_GROUPS)
    groups = [windows[start : start + size] for start in range(0, len(windows), size)]
    for start in range(0, len(groups), _GROUPS_AT_A_TIME):
        yield groups[start : start + _GROUPS_AT_A_TIME]


def check_windows(windows: Sequence[Window], model: ModelInfo) -> None:
    """Raise :class:`InvalidArgument` for a token id that the model has no embedding for.

    Such an id would end the engine. It occurs where the tokenizer has more tokens than the model.
    """
    for window in windows:
        for token_id in window:
            if not 0 <= token_id < model.vocab_size:
                raise InvalidArgument(
                    "text",
                    f"token id {token_id}",
                    f"text whose tokens the model knows, which are 0 to {model.vocab_size - 1}; "
                    "the tokenizer has more of them than the model",
                )


def reference_sums(sums: Sequence[float]) -> list[float]:
    """Return the :func:`pruning.quality.paired_statistics` of the reference in a window.

    ``sums`` are those of anything that was compared with it there.
    """
    num_tokens, _, _, _, loss = sums
    return [num_tokens, loss, num_tokens, 0.0, loss]


def finite_quality(sums: Sequence[Sequence[float | None]], depth: str) -> Quality:
    """Return what :func:`pruning.quality.quality_of_windows` does.

    Raises :class:`NonFiniteResult`, naming the depth, for a sum that is not finite.
    """
    for window in sums:
        if not all(math.isfinite(value) for value in window if value is not None):
            raise NonFiniteResult(depth)
    return quality_of_windows(sums)
