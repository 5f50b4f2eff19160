"""The example drawn in the package's documentation is what the code does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from server.engine import elastic
from server.engine.base import LayerSelection
from server.engine.elastic.metadata_fields import FieldKind, fields_of
from server.engine.elastic.payload import Payload
from server.engine.elastic.residual_stream import Repair, ResidualStream
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.stand_ins import LinearMap
from server.engine.elastic.step import ElasticStep, TokenIndices, TokenSubset, Whole

NUM_LAYERS = 4
# Rows A, B, C: the layers they skip, the length of their prompts, the tokens that their requests
# have in all, and the tokens that the step computes.
ROWS = [
    (LayerSelection(), 3, 9, 1),
    (LayerSelection((1, 2), (1, 2)), 2, 5, 1),
    (LayerSelection((3,), ()), 2, 3, 3),
]


class PlainBuilder:
    """Builds metadata that is just its arguments."""

    def build_plain(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        return common


def metadata(**changes: Any) -> CommonAttentionMetadata:
    lengths = torch.tensor([length for _, _, length, _ in ROWS], dtype=torch.int32)
    query_start = torch.tensor([0, 1, 2, 5], dtype=torch.int32)
    fields: dict[str, Any] = {
        "query_start_loc": query_start,
        "query_start_loc_cpu": query_start,
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": 3,
        "num_actual_tokens": 5,
        "max_query_len": 3,
        "max_seq_len": 9,
        "block_table_tensor": torch.tensor([[10], [11], [12]]),
        "slot_mapping": torch.arange(100, 105),
        "is_prefilling": torch.tensor([False, False, True]),
    }
    return CommonAttentionMetadata(**{**fields, **changes})


def step(**changes: Any) -> ElasticStep:
    table = RowTable(len(ROWS), NUM_LAYERS)
    for row, (layers, num_prompt, _, _) in enumerate(ROWS):
        table.put(row, Payload(layers), range(num_prompt))
    return ElasticStep(PlainBuilder(), metadata(**changes), table)


def drawn() -> list[tuple[list[int] | Whole, list[int]]]:
    """Return each layer's active and KV-only tokens as the table draws them."""
    lines = re.findall(
        r"^    layer (\d) ((?: +[xk.]){5}) +(.+?)  +(.+)$", elastic.__doc__ or "", re.M
    )
    assert [int(layer) for layer, *_ in lines] == list(range(NUM_LAYERS))
    found: list[tuple[list[int] | Whole, list[int]]] = []
    for _, marks, active, kv_only in lines:
        tokens = [[i for i, mark in enumerate(marks.split()) if mark == kind] for kind in "xk"]
        assert (kv_only == "none") == (not tokens[1])
        if tokens[1]:
            assert kv_only == ", ".join(map(str, tokens[1]))
        if active == "Whole.ALL":
            assert len(tokens[0]) == 5
            found.append((Whole.ALL, tokens[1]))
        else:
            assert active == f"subset {', '.join(map(str, tokens[0]))}"
            found.append((tokens[0], tokens[1]))
    return found


def test_tokens_of_each_layer_are_those_of_the_table() -> None:
    example = step()
    assert example.spans.rows.tolist() == [0, 1, 2, 2], "the spans of the table"
    for layer, (active, kv_only) in enumerate(drawn()):
        tokens = example.active_tokens(layer)
        found = tokens.tokens.tolist() if isinstance(tokens, TokenSubset) else tokens
        assert found == active, f"layer {layer}"
        left = example.kv_only_tokens(layer)
        assert ([] if left is None else left.tolist()) == kv_only, f"layer {layer}"
    assert example.active_tokens(1) is example.active_tokens(2), "one subset for both"
    assert not example.is_uniform


def test_attention_sees_the_rows_that_the_example_says() -> None:
    example = step()
    two_rows, three_rows = example.active_tokens(1), example.active_tokens(3)
    assert isinstance(two_rows, TokenSubset)
    assert isinstance(three_rows, TokenSubset)
    common = two_rows.metadata
    assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist() == [0, 1, 4]
    assert common.seq_lens.tolist() == common.seq_lens_cpu_upper_bound.tolist() == [9, 3]
    assert (common.num_reqs, common.num_actual_tokens, common.max_query_len) == (2, 4, 3)
    assert common.block_table_tensor.tolist() == [[10], [12]]
    assert common.slot_mapping.tolist() == [100, 102, 103, 104]
    assert common.is_prefilling.tolist() == [False, True]
    common = three_rows.metadata
    assert common.query_start_loc.tolist() == [0, 1, 2, 3]
    assert common.seq_lens.tolist() == [9, 5, 3]
    assert common.block_table_tensor.tolist() == [[10], [11], [12]]
    assert common.slot_mapping.tolist() == [100, 101, 104]


def test_tokens_that_come_after_a_subset_have_no_keys_in_its_layer_yet() -> None:
    """The prompt of row C runs a layer that its generated tokens skip."""
    table = RowTable(len(ROWS), NUM_LAYERS)
    table.put(2, Payload(LayerSelection((), (1,))), range(2))
    subset = ElasticStep(PlainBuilder(), metadata(), table).active_tokens(1)
    assert isinstance(subset, TokenSubset)
    assert subset.tokens.tolist() == [0, 1, 2, 3]
    assert subset.metadata.seq_lens.tolist() == [9, 5, 2]


def test_layers_with_the_same_active_tokens_run_together() -> None:
    example = step()
    ran: list[tuple[list[int], list[int]]] = []

    def run(layers: Any, positions: Any, hidden: Any, residual: Any) -> Any:
        ran.append((list(layers), positions.tolist()))
        return hidden + 1, residual

    stream = ResidualStream(run, torch.arange(5), torch.zeros(5, 1), torch.zeros(5, 1))
    for layer in range(NUM_LAYERS):
        stream.add(layer, example.active_tokens(layer))
    hidden, _ = stream.parts()
    assert ran == [([0], [0, 1, 2, 3, 4]), ([1, 2], [0, 2, 3, 4]), ([3], [0, 1, 4])]
    assert hidden.flatten().tolist() == [3, 2, 2, 2, 3], "once for each time it was run"


def test_stand_ins_repair_the_tokens_that_skip_their_layer() -> None:
    """Row B is repaired in layers 1 and 2, by one map; row C does not ask for it."""
    table = RowTable(len(ROWS), NUM_LAYERS)
    number = table.add_repair("sha256:maps", [1, 2, 3])
    for row, (layers, num_prompt, _, _) in enumerate(ROWS):
        repair = "sha256:maps" if row == 1 else None
        table.put(row, Payload(replace(layers, repair=repair)), range(num_prompt))
    example = ElasticStep(PlainBuilder(), metadata(), table)
    assert [example.repaired_tokens(layer) for layer in (0, 1, 3)] == [[], [], []]
    [(run_of_maps, repaired)] = example.repaired_tokens(2)
    assert run_of_maps == (number, range(1, 3))
    assert isinstance(repaired, TokenIndices)
    assert repaired.tokens.tolist() == [1]

    ran: list[tuple[list[int], list[int]]] = []

    def run(layers: Any, positions: Any, hidden: Any, residual: Any) -> Any:
        ran.append((list(layers), positions.tolist()))
        return hidden + 1, residual

    stream = ResidualStream(run, torch.arange(5), torch.zeros(5, 1), torch.ones(5, 1))
    for layer in range(NUM_LAYERS):
        repairs = [
            Repair(LinearMap(torch.tensor([[float(sum(run.layers))]])), tokens)
            for run, tokens in example.repaired_tokens(layer)
        ]
        stream.add(layer, example.active_tokens(layer), repairs)
    hidden, residual = stream.parts()
    assert ran == [([0], [0, 1, 2, 3, 4]), ([1, 2], [0, 2, 3, 4]), ([3], [0, 1, 4])]
    # Token 1 is 2 after layer 0; it is multiplied by 1 + 1 + 2, and layer 3 adds 1.
    assert (hidden + residual).flatten().tolist() == [4, 9, 3, 3, 4]


def test_a_layer_that_all_tokens_skip_is_repaired_whole() -> None:
    table = RowTable(len(ROWS), NUM_LAYERS)
    number = table.add_repair("sha256:maps", [1])
    for row in range(len(ROWS)):
        table.put(row, Payload(LayerSelection((1,), (1,), "sha256:maps")), range(2))
    example = ElasticStep(PlainBuilder(), metadata(), table)
    assert example.is_uniform
    assert example.repaired_tokens(1) == [((number, range(1, 2)), Whole.ALL)]
    table.put(0, Payload(LayerSelection((1,), (1,))), range(2))
    mixed = ElasticStep(PlainBuilder(), metadata(), table)
    assert not mixed.is_uniform, "one row does not ask for repair"
    [(found, tokens)] = mixed.repaired_tokens(1)
    assert found == (number, range(1, 2))
    assert isinstance(tokens, TokenIndices)


def test_rows_are_repaired_by_the_maps_that_each_asks_for() -> None:
    """Rows A and C skip layer 1, row B layers 1 and 2, with maps of their own; C's lack layer 1."""
    table = RowTable(len(ROWS), NUM_LAYERS)
    first = table.add_repair("sha256:first", [1, 2])
    second = table.add_repair("sha256:second", [1, 2])
    table.add_repair("sha256:third", [3])
    assert table.add_repair("sha256:first", [1, 2]) == first
    for row, (skips, repair) in enumerate(
        [((1,), "sha256:first"), ((1, 2), "sha256:second"), ((1,), "sha256:third")]
    ):
        table.put(row, Payload(LayerSelection(skips, skips, repair)), range(2))
    example = ElasticStep(PlainBuilder(), metadata(), table)
    assert not example.is_uniform

    def repaired(layer: int) -> list[tuple[int, range, list[int]]]:
        found = []
        for (number, layers), tokens in example.repaired_tokens(layer):
            assert isinstance(tokens, TokenIndices)
            found.append((number, layers, tokens.tokens.tolist()))
        return found

    assert repaired(1) == [(first, range(1, 2), [0])]
    assert repaired(2) == [(second, range(1, 3), [1])]
    maps = {number: LinearMap(torch.tensor([[x]])) for number, x in ((first, 10.0), (second, 2.0))}
    ran: list[tuple[list[int], list[int]]] = []

    def run(layers: Any, positions: Any, hidden: Any, residual: Any) -> Any:
        ran.append((list(layers), positions.tolist()))
        return hidden + 1, residual

    stream = ResidualStream(run, torch.arange(5), torch.zeros(5, 1), torch.ones(5, 1))
    for layer in range(NUM_LAYERS):
        repairs = [Repair(maps[n], tokens) for (n, _), tokens in example.repaired_tokens(layer)]
        stream.add(layer, example.active_tokens(layer), repairs)
    hidden, residual = stream.parts()
    assert ran == [([0], [0, 1, 2, 3, 4]), ([2], [0, 2, 3, 4]), ([3], [0, 1, 2, 3, 4])]
    # After layer 0 all are 2. Token 0 is eleven times that, token 1 three times.
    assert (hidden + residual).flatten().tolist() == [24, 7, 4, 4, 4]


def test_a_gated_mlp_is_applied_in_front_of_its_run() -> None:
    """It stands in for layers 1 and 2 of row B, under layer 1."""
    table = RowTable(len(ROWS), NUM_LAYERS)
    number = table.add_repair("sha256:mlps", [1])
    for row, (skips, repair) in enumerate([((), None), ((1, 2), "sha256:mlps"), ((), None)]):
        table.put(row, Payload(LayerSelection(skips, skips, repair)), range(2))
    example = ElasticStep(PlainBuilder(), metadata(), table)
    assert [example.repaired_tokens(layer) for layer in (0, 2, 3)] == [[], [], []]
    [(run, repaired)] = example.repaired_tokens(1)
    assert run == (number, range(1, 2))
    assert isinstance(repaired, TokenIndices)
    assert repaired.tokens.tolist() == [1]


def test_rows_that_move_keep_their_repair() -> None:
    table = RowTable(4, NUM_LAYERS)
    table.add_repair("sha256:others", [1])
    assert table.add_repair("sha256:maps", [1]) == 2
    table.put(0, Payload(LayerSelection((1,), (1,), "sha256:maps")), range(2))
    table.move(0, 3)
    table.swap(3, 1)
    assert table.repair.tolist() == [2, 2, 0, 0]
    table.clear(1)
    assert table.repair.tolist() == [2, 0, 0, 0]


def test_field_that_cannot_be_cut_is_an_error() -> None:
    for name in fields_of(FieldKind.UNUSED):
        example = step(**{name: torch.zeros(1)})
        with pytest.raises(RuntimeError, match=f"has set {name} of"):
            example.active_tokens(1)
