"""The tokens of one step, grouped by the layers they run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine.elastic.row_table import RowTable

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSpans:
    """Spans of consecutive tokens of one row that run the same layers, in token order.

    A row has one span, or two where it is recomputed after a preemption: prompt tokens, then
    generated ones, if they run different layers. Whether a token is one or the other depends on
    its position alone, so a recomputed request does what it did before.

    ``rows``, ``starts``, ``stops``: [num_spans]; ``runs``: [num_spans, num_layers], the layers
    that the span's tokens run; ``leaves_keys``: likewise, the layers that they skip but leave
    keys and values in.
    """

    rows: Ints
    starts: Ints
    stops: Ints
    runs: Bools
    leaves_keys: Bools | None

    @classmethod
    def of_step(cls, table: RowTable, query_start: Ints, first_position: Ints) -> TokenSpans:
        """Make the spans of a step.

        Args:
            table: The layer choices of the batch's rows.
            query_start: [num_rows + 1], where each row's tokens start in the step.
            first_position: [num_rows], the position of each row's first token in its request.
        """
        num_rows = len(first_position)
        starts, stops = query_start[:-1], query_start[1:]
        is_split = table.is_split[:num_rows]
        if not is_split.any():
            rows = np.flatnonzero(stops > starts)
            return cls(rows, starts[rows], stops[rows], table.prefill_runs[rows], None)

        lengths = stops - starts
        num_prompt = np.clip(table.num_context[:num_rows] - first_position, 0, lengths)
        num_prompt = np.where(is_split, num_prompt, lengths)
        middles = starts + num_prompt
        both_starts = np.stack([starts, middles], axis=1).ravel()
        both_stops = np.stack([middles, stops], axis=1).ravel()
        kept = np.flatnonzero(both_stops > both_starts)
        rows, is_generated = kept // 2, (kept % 2).astype(np.bool_)
        prefill_runs, decode_runs = table.prefill_runs[rows], table.decode_runs[rows]
        runs = np.where(is_generated[:, None], decode_runs, prefill_runs)
        return cls(
            rows,
            both_starts[kept],
            both_stops[kept],
            runs,
            ~is_generated[:, None] & decode_runs & ~prefill_runs,
        )


def token_indices(starts: Ints, stops: Ints) -> Ints:
    """Return the indices of the tokens in ``[starts[i], stops[i])`` for every i, in order."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.repeat(starts - (ends - lengths), lengths)
    return offsets + np.arange(total)
