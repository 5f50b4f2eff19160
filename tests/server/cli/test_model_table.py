"""The table of ``fathom model`` on a terminal of 80 columns."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from server.cli.model import _repair, _table
from server.cli.probes_table import probes_table
from server.cli.short_number import short_number as _short
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

COLUMNS = 80
NUMBERS = st.floats(min_value=0) | st.just(math.nan)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
DEPTHS = st.integers(1, 999)


@st.composite
def levels(draw: st.DrawFn, names: st.SearchStrategy[str]) -> common_pb2.Level:
    return common_pb2.Level(
        name=draw(names),
        prefill_layers=draw(DEPTHS),
        decode_layers=draw(DEPTHS),
        is_default=draw(st.booleans()),
        quality=common_pb2.Quality(
            perplexity=draw(NUMBERS),
            perplexity_stderr=draw(NUMBERS),
            agreement=draw(st.floats(0, 1)),
            kl_nats=draw(NUMBERS),
        ),
        speed=common_pb2.Speed(tokens_per_second=draw(NUMBERS), speedup=draw(NUMBERS)),
        max_quality_loss=draw(st.none() | NUMBERS),
        max_writing_loss=draw(st.none() | NUMBERS),
        max_choosing_loss=draw(st.none() | st.floats(0, 1)),
    )


def printed(model: inference_pb2.Model) -> list[str]:
    return lines_of(_table(model))


def lines_of(table: Table) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=COLUMNS, highlight=False).print(table)
    return file.getvalue().splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│")
    ]


@given(st.lists(levels(NAMES), min_size=1, max_size=4), st.lists(levels(st.just("")), max_size=4))
def test_the_whole_table_fits(
    named: list[common_pb2.Level], others: list[common_pb2.Level]
) -> None:
    lines = printed(inference_pb2.Model(levels=named, depths=others))
    assert max(map(len, lines)) <= COLUMNS
    assert "…" not in "".join(lines)
    rows = cells(lines)
    names = "".join(row[1] for row in rows)
    shown = {(each.prefill_layers, each.decode_layers): each for each in [*others, *named]}
    for level in named:
        assert level.name in names
    for (prefill, decode), level in shown.items():
        depth = str(decode) if prefill == decode else f"{prefill}/{decode}"
        perplexity = f"{_short(level.quality.perplexity)} ± "
        assert any(row[0] == depth and row[2].startswith(perplexity) for row in rows)
    for row in rows:
        if row[0]:
            assert all(row[2:])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (19.734, "19.73"),
        (999.994, "999.99"),
        (999.9996, "1000"),
        (9060.4, "9060"),
        (26_900.0, "26900"),
        (99_999.6, "1.0e5"),
        (123_456.0, "1.2e5"),
        (1.7e308, "1.7e308"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert _short(value) == text
    assert len(text) <= 7


def test_a_model_as_it_mostly_is() -> None:
    dense = common_pb2.Level(
        name="dense",
        prefill_layers=30,
        decode_layers=30,
        is_default=True,
        quality=common_pb2.Quality(perplexity=10.9, perplexity_stderr=1.25, agreement=1, kl_nats=0),
        speed=common_pb2.Speed(tokens_per_second=474, speedup=1),
    )
    turbo = common_pb2.Level(name="turbo", prefill_layers=7, decode_layers=7, max_quality_loss=1)
    turbo.quality.CopyFrom(common_pb2.Quality(perplexity=26_900, perplexity_stderr=12_345))
    assert cells(printed(inference_pb2.Model(levels=[dense, turbo]))) == [
        ["30", "dense *", "10.90 ± 1.25", "100.0%", "0.000", "474", "1.00x"],
        ["7", "turbo ≤100%", "26900 ± 12345", "-", "-", "-", "-"],
    ]


def test_limits_of_writing_and_choosing_are_told_apart() -> None:
    level = common_pb2.Level(
        name="chat", prefill_layers=7, decode_layers=7, max_writing_loss=0.25, max_choosing_loss=0.1
    )
    lines = printed(inference_pb2.Model(levels=[level]))
    assert cells(lines)[0][1] == "chat ≤25%w ≤10%c"
    caption = " ".join(line.strip() for line in lines)
    assert "≤10%w: that loses at most 10% in writing, repetition included" in caption
    assert "≤10%c: that finds at most 10% fewer true continuations" in caption


def test_the_line_about_repair() -> None:
    repair = inference_pb2.Repair(
        kind=common_pb2.STAND_IN_CLOSED_FORM, num_bytes=20_000_000, num_tokens=28_672
    )
    assert _repair(repair) == "Repair: closed-form, 20.0 MB, fitted on 28672 tokens"
    repair.kl_nats, repair.kl_nats_without = 0.1234, 4.5
    line = _repair(repair)
    assert line.endswith("tokens; mean KL of the levels 0.123, 4.500 without")


def test_a_long_line_about_repair_is_wrapped() -> None:
    repair = inference_pb2.Repair(
        kind=common_pb2.STAND_IN_CLOSED_FORM,
        num_bytes=2**63,
        num_tokens=2**63,
        kl_nats=1.7e308,
        kl_nats_without=math.inf,
    )
    file = io.StringIO()
    Console(file=file, width=COLUMNS, highlight=False).print(_repair(repair))
    assert max(map(len, file.getvalue().splitlines())) <= COLUMNS
    assert "…" not in file.getvalue()


@st.composite
def probed_levels(draw: st.DrawFn) -> common_pb2.Level:
    """Return a level with any values, or without the dense model, or without a probe."""
    shares = st.floats(0, 1)
    level = common_pb2.Level(
        name=draw(NAMES), prefill_layers=draw(DEPTHS), decode_layers=draw(DEPTHS)
    )
    has_dense = draw(st.booleans())
    if draw(st.booleans()):
        level.writing.CopyFrom(common_pb2.Writing(repeated_share=draw(shares)))
        if has_dense:
            level.writing.ratio = draw(NUMBERS)
            level.writing.ratio_stderr = draw(NUMBERS)
            level.writing.first_token_changed = draw(shares)
    if draw(st.booleans()):
        level.choosing.CopyFrom(
            common_pb2.Choosing(accuracy=draw(shares), accuracy_stderr=draw(st.floats(0, 0.25)))
        )
        if has_dense:
            level.choosing.agreement = draw(shares)
            level.choosing.agreement_stderr = draw(st.floats(0, 0.25))
    return level


@given(st.lists(probed_levels(), min_size=1, max_size=4))
def test_the_whole_table_of_probes_fits(levels: list[common_pb2.Level]) -> None:
    table = probes_table(inference_pb2.Model(levels=levels))
    measured = [each for each in levels if each.HasField("writing") or each.HasField("choosing")]
    if not measured:
        assert table is None
        return
    assert table is not None
    lines = lines_of(table)
    assert max(map(len, lines)) <= COLUMNS
    assert "…" not in "".join(lines)
    rows = cells(lines)
    names = "".join(row[0] for row in rows)
    for level in measured:
        assert level.name in names
        if level.writing.HasField("ratio"):
            ratio = f"{_short(level.writing.ratio)} ± {_short(level.writing.ratio_stderr)}"
            assert any(row[1] == ratio for row in rows)


def test_the_probes_of_a_model_as_it_mostly_is() -> None:
    dense, fast, small = (
        common_pb2.Level(name=name, prefill_layers=depth, decode_layers=depth)
        for name, depth in (("dense", 30), ("fast", 25), ("small", 20))
    )
    dense.writing.CopyFrom(
        common_pb2.Writing(ratio=1, ratio_stderr=0, repeated_share=0.286, first_token_changed=0)
    )
    dense.choosing.CopyFrom(
        common_pb2.Choosing(
            accuracy=0.891, accuracy_stderr=0.041, agreement=1, agreement_stderr=0.02
        )
    )
    fast.writing.CopyFrom(common_pb2.Writing(repeated_share=0.567))
    table = probes_table(inference_pb2.Model(levels=[fast, small, dense]))
    assert table is not None
    assert cells(lines_of(table)) == [
        ["dense", "1.00 ± 0.00", "29%", "0%", "89% ± 4%", "100% ± 2%"],
        ["fast", "-", "57%", "-", "-", "-"],
    ]
