"""The table of ``fathom model`` that shows how the levels write and choose."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from server.cli.short_number import short_number
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2


def probes_table(served: inference_pb2.Model) -> Table | None:
    """Return the table, which fits 80 columns; None where nothing was measured."""
    levels = [
        level for level in served.levels if level.HasField("writing") or level.HasField("choosing")
    ]
    if not levels:
        return None
    table = Table(caption_justify="left")
    # The other columns have 56 characters at most, borders included.
    table.add_column("Level", overflow="fold")
    for heading in ("Writing", "Repeats", "1st", "Choosing", "Agree"):
        table.add_column(heading, justify="right", no_wrap=True)
    for level in sorted(levels, key=_depths, reverse=True):
        table.add_row(escape(level.name), *_writing(level), *_choosing(level))
    table.caption = (
        "Writing: perplexity under the dense model of what the level writes / of what dense "
        "writes; Repeats: sequences of 4 tokens that were there before; 1st: first tokens that "
        "differ from dense's; Choosing: true continuations found among four; Agree: choices that "
        "are dense's"
    )
    return table


def _depths(level: common_pb2.Level) -> tuple[int, int]:
    return level.decode_layers, level.prefill_layers


def _writing(level: common_pb2.Level) -> tuple[str, str, str]:
    if not level.HasField("writing"):
        return "-", "-", "-"
    writing = level.writing
    ratio = "-"
    if writing.HasField("ratio"):
        ratio = f"{short_number(writing.ratio)} ± {short_number(writing.ratio_stderr)}"
    changed = "-"
    if writing.HasField("first_token_changed"):
        changed = f"{writing.first_token_changed:.0%}"
    return ratio, f"{writing.repeated_share:.0%}", changed


def _choosing(level: common_pb2.Level) -> tuple[str, str]:
    if not level.HasField("choosing"):
        return "-", "-"
    choosing = level.choosing
    agreement = "-"
    if choosing.HasField("agreement"):
        agreement = f"{choosing.agreement:.0%} ± {choosing.agreement_stderr:.0%}"
    return f"{choosing.accuracy:.0%} ± {choosing.accuracy_stderr:.0%}", agreement
