"""One step of the batch: which tokens run which layer, and attention metadata for them alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import CommonAttentionMetadata

from server.engine.elastic.metadata_fields import FieldKind, fields_of
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.token_spans import Bools, Ints, TokenSpans, token_indices

_ROW_FIELDS = fields_of(FieldKind.ROW)
_TOKEN_FIELDS = fields_of(FieldKind.TOKEN)
_CACHE_FIELDS = fields_of(FieldKind.CACHE)
_UNUSED_FIELDS = fields_of(FieldKind.UNUSED)


class Whole(enum.Enum):
    """The active tokens of a layer for which no subset has to be made."""

    ALL = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True, slots=True, eq=False)
class TokenSubset:
    """Some tokens of a step, and the attention metadata to run a layer on them alone.

    ``key`` tells which tokens: subsets of equal keys hold the same ones, also where they belong
    to layers that keep their caches apart. ``tokens`` and ``slot_mapping``: [num_tokens].
    """

    key: bytes
    tokens: torch.Tensor
    slot_mapping: torch.Tensor
    metadata: Any

    def install(self, context: ForwardContext, layer_name: str) -> None:
        """Let the attention layer of this name see the subset as its whole step."""
        metadata, slots = context.attn_metadata, context.slot_mapping
        assert isinstance(metadata, dict) and isinstance(slots, dict)
        metadata[layer_name], slots[layer_name] = self.metadata, self.slot_mapping


class StandInRun(NamedTuple):
    """Stand-ins of neighbouring layers that are applied as one: of which file and which layers."""

    number: int
    layers: range


@dataclass(frozen=True, slots=True, eq=False)
class TokenIndices:
    """Some tokens of a step, [num_tokens]; ``key`` as in :class:`TokenSubset`."""

    key: bytes
    tokens: torch.Tensor


# The tokens that run a layer.
ActiveTokens = Whole | TokenSubset
# Tokens for which a stand-in does a layer's work.
RepairedTokens = Whole | TokenIndices


class ElasticStep:
    """One step as the layers of one KV cache group see it.

    A subset is made when a layer first needs it, and kept under the spans that are in it. So a
    step has at most one subset for each distinct set of active tokens, whatever the number of
    layers.
    """

    def __init__(self, builder: Any, common: CommonAttentionMetadata, table: RowTable) -> None:
        self._builder = builder
        self._common = common
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        num_tokens = query_start[1:] - query_start[:-1]
        # The bound is the exact length as long as nothing decodes speculatively.
        bound = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens.cpu() if bound is None else bound).numpy()
        self.first_position: Ints = lengths.astype(np.int64) - num_tokens
        self.spans = TokenSpans.of_step(table, query_start, self.first_position)
        self._query_start = query_start
        self._subsets: dict[bytes, TokenSubset] = {}
        self._indices: dict[bytes, TokenIndices] = {}
        self._all_active: Bools = np.asarray(self.spans.active.all(axis=0))
        self._any_active: Bools = np.asarray(self.spans.active.any(axis=0))
        runs = self.spans.run_starts
        self._any_run_ends = None if runs is None else np.asarray((runs >= 0).any(axis=0))
        # Whether all spans have the same stand-ins, or none, in the place of the same layers.
        self._is_repaired_alike = runs is None or all(
            bool((each == each[:1]).all()) for each in (self.spans.repaired, runs)
        )
        # Whether every layer runs all tokens or none, its stand-in too, and there are no KV-only
        # tokens.
        self.is_uniform = (
            self.spans.kv_only is None
            and bool((self._all_active == self._any_active).all())
            and self._is_repaired_alike
        )

    def active_tokens(self, layer: int) -> ActiveTokens:
        """Return the tokens that run ``layer``."""
        if self._all_active[layer]:
            return Whole.ALL
        if not self._any_active[layer]:
            return Whole.NONE
        return self._subset(self.spans.active[:, layer])

    def repaired_tokens(self, layer: int) -> list[tuple[StandInRun, RepairedTokens]]:
        """Return the tokens that stand-ins of layers up to ``layer`` are applied to, by these.

        No token comes twice.
        """
        if self._any_run_ends is None or not self._any_run_ends[layer]:
            return []
        assert self.spans.run_starts is not None
        starts, numbers = self.spans.run_starts[:, layer], self.spans.repaired
        if self._is_repaired_alike:
            run = StandInRun(int(numbers[0]), range(int(starts[0]), layer + 1))
            return [(run, Whole.ALL)]
        runs = {
            pair for pair in zip(numbers.tolist(), starts.tolist(), strict=True) if pair[1] >= 0
        }
        return [
            (
                StandInRun(number, range(start, layer + 1)),
                self._repaired((numbers == number) & (starts == start)),
            )
            for number, start in sorted(runs)
        ]

    def _repaired(self, chosen: Bools) -> RepairedTokens:
        if chosen.all():
            return Whole.ALL
        key = chosen.tobytes()
        if key not in self._indices:
            starts, stops = self.spans.starts[chosen], self.spans.stops[chosen]
            self._indices[key] = TokenIndices(key, self._on_device(token_indices(starts, stops)))
        return self._indices[key]

    def kv_only_tokens(self, layer: int) -> torch.Tensor | None:
        """Return the tokens that skip ``layer`` but write keys and values there, [num_tokens].

        None if there are none.
        """
        if self.spans.kv_only is None:
            return None
        chosen = self.spans.kv_only[:, layer]
        if not chosen.any():
            return None
        return self._on_device(token_indices(self.spans.starts[chosen], self.spans.stops[chosen]))

    @property
    def num_tokens(self) -> int:
        return int(self._query_start[-1])

    def has_row(self, row: int) -> bool:
        return row < len(self.first_position)

    def row_tokens(self, row: int) -> slice:
        """Return where the tokens of a row are in the step."""
        return slice(int(self._query_start[row]), int(self._query_start[row + 1]))

    def _subset(self, chosen: Bools) -> TokenSubset:
        """Return the subset of the tokens in the ``chosen`` spans, [num_spans] of bool."""
        key = chosen.tobytes()
        if key not in self._subsets:
            self._subsets[key] = self._make_subset(chosen, key)
        return self._subsets[key]

    def _make_subset(self, chosen: Bools, key: bytes) -> TokenSubset:
        rows, starts, stops = self._row_ranges(chosen)
        tokens = self._on_device(token_indices(starts, stops))
        common = self._common
        for name in _UNUSED_FIELDS:
            if getattr(common, name) is not None:
                raise RuntimeError(
                    f"vLLM has set {name} of the attention metadata, which the elastic engine "
                    "cannot cut down to some of a step's tokens"
                )
        changes = self._computed_fields(rows, starts, stops)
        for names, index in ((_ROW_FIELDS, self._on_device(rows)), (_TOKEN_FIELDS, tokens)):
            changes |= {name: _entries(getattr(common, name), index) for name in names}
        changes |= dict.fromkeys(_CACHE_FIELDS)
        subset = common.replace(**changes)
        return TokenSubset(key, tokens, subset.slot_mapping, self._builder.build_plain(subset))

    def _row_ranges(self, chosen: Bools) -> tuple[Ints, Ints, Ints]:
        """Return the rows that have tokens in the ``chosen`` spans, and where these start and stop.

        Each is [num_rows]. The spans of a row are neighbours, so its tokens are one range.
        """
        rows = self.spans.rows[chosen]
        changes = rows[1:] != rows[:-1]
        is_first, is_last = np.append(True, changes), np.append(changes, True)
        starts, stops = self.spans.starts[chosen], self.spans.stops[chosen]
        return rows[is_first], starts[is_first], stops[is_last]

    def _computed_fields(self, rows: Ints, starts: Ints, stops: Ints) -> dict[str, Any]:
        """Return the counts, starts and lengths of a subset with these ranges of rows."""
        common = self._common
        num_tokens = stops - starts
        query_start = torch.from_numpy(np.append(0, np.cumsum(num_tokens)).astype(np.int32))
        # Tokens after the subset's in a row have no keys and values in this layer yet.
        num_later = torch.from_numpy(self._query_start[rows + 1] - stops)
        kept = torch.from_numpy(rows)
        lengths = common.seq_lens[kept.to(common.seq_lens.device)]
        bound = common.seq_lens_cpu_upper_bound
        if bound is not None:
            bound = bound[kept] - num_later.to(bound)
        return {
            "query_start_loc_cpu": query_start,
            "query_start_loc": query_start.to(common.query_start_loc.device),
            "seq_lens": lengths - num_later.to(lengths),
            "seq_lens_cpu_upper_bound": bound,
            "num_reqs": len(rows),
            "num_actual_tokens": int(num_tokens.sum()),
            "max_query_len": int(num_tokens.max()),
        }

    def _on_device(self, indices: Ints) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._common.query_start_loc.device)


def _entries(values: Any, index: torch.Tensor) -> Any:
    """Return some entries of a field; a single value, or None, stands for all of them."""
    if isinstance(values, torch.Tensor):
        return values[index.to(values.device)]
    if isinstance(values, np.ndarray):
        return values[index.cpu().numpy()]
    return values
