"""The table of ``fathom model`` on a terminal of 80 columns."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from server.cli.model import _short, _table
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
    )


def printed(model: inference_pb2.Model) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=COLUMNS, highlight=False).print(_table(model))
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
