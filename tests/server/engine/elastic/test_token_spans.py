from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.engine.base import LayerSelection
from server.engine.elastic.payload import Payload
from server.engine.elastic.row_table import RowTable
from server.engine.elastic.token_spans import TokenSpans, token_indices

NUM_LAYERS = 4
layer_sets = st.sets(st.integers(0, NUM_LAYERS - 1)).map(lambda s: tuple(sorted(s)))


@st.composite
def rows(draw: st.DrawFn) -> tuple[LayerSelection, int, int, int]:
    """A request's layers, the length of its prompt, and the tokens of it that a step computes."""
    prefill = draw(layer_sets)
    decode = prefill if draw(st.booleans()) else draw(layer_sets)
    num_prompt = draw(st.integers(1, 6))
    first = draw(st.integers(0, 8))
    return LayerSelection(prefill, decode), num_prompt, first, draw(st.integers(0, 5))


@given(st.lists(rows(), max_size=6))
def test_spans_say_of_each_token_what_its_position_says(
    step: list[tuple[LayerSelection, int, int, int]],
) -> None:
    table = RowTable(8, NUM_LAYERS)
    for row, (layers, num_prompt, _, _) in enumerate(step):
        table.put(row, Payload(layers), range(num_prompt))
    lengths = np.array([length for *_, length in step], np.int64)
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    firsts = np.array([first for _, _, first, _ in step], np.int64)

    spans = TokenSpans.of_step(table, query_start, firsts)

    seen = []
    for index, (row, start, stop) in enumerate(
        zip(spans.rows, spans.starts, spans.stops, strict=True)
    ):
        layers, num_prompt, first, _ = step[row]
        for token in range(start, stop):
            seen.append(token)
            is_prompt = first + token - query_start[row] < num_prompt
            skips = layers.prefill_skips if is_prompt else layers.decode_skips
            assert spans.active[index].tolist() == [i not in skips for i in range(NUM_LAYERS)]
            expected = [
                is_prompt and i in layers.prefill_skips and i not in layers.decode_skips
                for i in range(NUM_LAYERS)
            ]
            kv_only = spans.kv_only
            assert (kv_only[index].tolist() if kv_only is not None else [False] * 4) == expected
    assert seen == list(range(query_start[-1])), "every token of the step is in one span, in order"


@given(layer_sets, layer_sets, layer_sets)
def test_maps_of_neighbouring_layers_are_one_where_no_keys_and_values_are_written(
    prefill: tuple[int, ...], decode: tuple[int, ...], mapped: tuple[int, ...]
) -> None:
    """A prompt of two tokens and a generated one, against a walk over the layers."""
    table = RowTable(1, NUM_LAYERS)
    number = table.add_repair("sha256:maps", mapped)
    table.put(0, Payload(LayerSelection(prefill, decode, "sha256:maps")), range(2))
    spans = TokenSpans.of_step(table, np.array([0, 3]), np.array([0]))
    assert spans.run_starts is not None
    assert set(spans.repaired.tolist()) == {number}
    for index, starts in enumerate(spans.run_starts.tolist()):
        runs = [range(start, end + 1) for end, start in enumerate(starts) if start >= 0]
        skips = prefill if index == 0 else decode
        kv_only = set(prefill) - set(decode) if index == 0 else set()
        expected: list[range] = []
        for layer in sorted(set(skips) & set(mapped)):
            if expected and expected[-1].stop == layer and layer not in kv_only:
                expected[-1] = range(expected[-1].start, layer + 1)
            else:
                expected.append(range(layer, layer + 1))
        assert runs == expected


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5))))
def test_token_indices_are_the_ranges_one_after_another(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in pairs], np.int64)
    stops = np.array([start + length for start, length in pairs], np.int64)
    expected = [i for start, length in pairs for i in range(start, start + length)]
    assert token_indices(starts, stops).tolist() == expected


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 4), layer_sets),
            st.tuples(st.just("clear"), st.integers(0, 4), st.just(())),
            st.tuples(st.sampled_from(["move", "swap"]), st.integers(0, 4), st.integers(0, 4)),
        )
    )
)
def test_row_table_follows_the_batch(operations: list[tuple[str, int, object]]) -> None:
    """Against a dictionary that does the same."""
    table = RowTable(5, NUM_LAYERS)
    model: dict[int, tuple[int, ...]] = {}
    for name, row, argument in operations:
        if name == "put":
            assert isinstance(argument, tuple)
            table.put(row, Payload(LayerSelection(argument, argument)), [1])
            model[row] = argument
        elif name == "clear":
            table.clear(row)
            model.pop(row, None)
        else:
            assert isinstance(argument, int)
            if name == "move":
                table.move(row, argument)
                skips = model.get(row, ())
                model[argument] = skips
            else:
                table.swap(row, argument)
                model[row], model[argument] = model.get(argument, ()), model.get(row, ())
        for each in range(5):
            skips = tuple(np.flatnonzero(~table.prefill_active[each]).tolist())
            assert skips == model.get(each, ())


@given(layer_sets, layer_sets, st.none() | st.integers(0, 9))
def test_payload_survives_the_way_through_vllm(
    prefill: tuple[int, ...], decode: tuple[int, ...], num_context: int | None
) -> None:
    payload = Payload(LayerSelection(prefill, decode), num_context)
    assert Payload.from_extra_args(payload.to_extra_args()) == payload
