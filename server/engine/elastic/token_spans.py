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

    A row has one span. It has two in the step that recomputes it after a preemption: its prompt
    tokens, then its generated ones, if these run different layers. Whether a token is one or the
    other follows from its position alone, so a recomputed request does what it did before.

    ``rows``, ``starts``, ``stops``: [num_spans]. ``active``: [num_spans, num_layers], whether the
    span's tokens run the layer. ``kv_only``: [num_spans, num_layers], whether they skip the
    layer but write keys and values there; None if no span does in any layer. ``repaired``:
    [num_spans], the number of the file whose stand-ins do the work of the layers they skip, 0
    where none do. ``run_starts``: [num_spans, num_layers], the first layer of the run of layers
    with stand-ins that ends with this one, where they are applied as one, -1 where none ends; None
    if no span has any. Keys and values need the stream in front of their layer, so a run ends
    there. A gated MLP is a run of its own, at the first of the layers that it stands in for.
    """

    rows: Ints
    starts: Ints
    stops: Ints
    active: Bools
    kv_only: Bools | None
    repaired: Ints
    run_starts: Ints | None

    @classmethod
    def of_step(cls, table: RowTable, query_start: Ints, first_position: Ints) -> TokenSpans:
        """Return the spans of a step.

        Args:
            table: The layer choices of the batch's rows.
            query_start: [num_rows + 1], where each row's tokens start in the step.
            first_position: [num_rows], the position of each row's first token in its request.
        """
        num_rows = len(first_position)
        starts, stops = query_start[:-1], query_start[1:]
        if not table.is_split[:num_rows].any():  # true of most steps
            rows = np.flatnonzero(stops > starts)
            active = table.prefill_active[rows]
            runs = _run_starts(table, rows, active, None)
            return cls(rows, starts[rows], stops[rows], active, None, table.repair[rows], runs)

        # Each row is cut where its prompt ends, and the empty parts are dropped.
        cuts = _prompt_stops(table, starts, stops, first_position)
        part_starts = np.stack([starts, cuts], axis=1)  # [num_rows, 2]
        part_stops = np.stack([cuts, stops], axis=1)
        rows, parts = np.nonzero(part_stops > part_starts)  # in token order
        is_prompt = (parts == 0)[:, None]
        prefill_active, decode_active = table.prefill_active[rows], table.decode_active[rows]
        active = np.where(is_prompt, prefill_active, decode_active)
        kv_only = is_prompt & decode_active & ~prefill_active
        return cls(
            rows,
            part_starts[rows, parts],
            part_stops[rows, parts],
            active=active,
            kv_only=kv_only,
            repaired=table.repair[rows],
            run_starts=_run_starts(table, rows, active, kv_only),
        )


def _run_starts(table: RowTable, rows: Ints, active: Bools, kv_only: Bools | None) -> Ints | None:
    numbers = table.repair[rows]
    if not numbers.any():  # true of dense steps
        return None
    repaired = ~active & table.has_stand_in[numbers]
    goes_on = repaired[:, :-1] & repaired[:, 1:]  # from a layer to the next one
    if kv_only is not None:
        goes_on &= ~kv_only[:, 1:]
    edge = np.zeros((len(rows), 1), np.bool_)
    begins = repaired & ~np.concatenate([edge, goes_on], axis=1)
    ends = repaired & ~np.concatenate([goes_on, edge], axis=1)
    layers = np.arange(repaired.shape[1])
    starts = np.maximum.accumulate(np.where(begins, layers, -1), axis=1)
    return np.where(ends, starts, -1)


def _prompt_stops(table: RowTable, starts: Ints, stops: Ints, first_position: Ints) -> Ints:
    """Return where each row's prompt tokens stop in the step, [num_rows].

    All tokens of a row that does not tell prompt from generated tokens count as prompt.
    """
    num_rows = len(first_position)
    num_tokens = stops - starts
    num_prompt = np.clip(table.num_context[:num_rows] - first_position, 0, num_tokens)
    stops_in_row: Ints = np.where(table.is_split[:num_rows], num_prompt, num_tokens)
    return starts + stops_in_row


def token_indices(starts: Ints, stops: Ints) -> Ints:
    """Return the indices of the tokens in ``[starts[i], stops[i])`` for every i, in order."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    offsets: Ints = np.repeat(starts - (ends - lengths), lengths)
    return offsets + np.arange(total)
