"""``fathom model``."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from server.cli.calibrate import plan_line
from server.cli.connection import Connection, connected, with_connection
from server.cli.probes_table import probes_table
from server.cli.short_number import short_number as _short
from server.cli.stand_in import stand_in_name
from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

# What a level may lose -> what follows it in the table.
_LIMITS: dict[Literal["max_quality_loss", "max_writing_loss", "max_choosing_loss"], str] = {
    "max_quality_loss": "",
    "max_writing_loss": "w",
    "max_choosing_loss": "c",
}


@with_connection
def model(connection: Connection) -> None:
    """Show the model that is served, and what each depth costs and gains."""
    with connected(connection) as client:
        served = client.get_model()
        unmeasured = _unmeasured(client)
    console = Console(highlight=False)
    quantization = f", {served.quantization}" if served.quantization else ""
    console.print(
        escape(
            f"{served.name}: {served.architecture}, {served.num_layers} layers, "
            f"{served.dtype}{quantization}, context of {served.max_context} tokens"
        )
    )
    console.print(plan_line(served.plan))
    if served.HasField("repair"):
        console.print(_repair(served.repair))
    console.print(_table(served))
    if (probes := probes_table(served)) is not None:
        console.print(probes)
    if unmeasured:
        console.print(escape(f"To be measured when no request runs: {'; '.join(unmeasured)}"))


def _unmeasured(client: Client) -> list[str]:
    """Return what the server will still measure; none where the caller may not know."""
    try:
        return list(client.get_status().unmeasured)
    except CallError as error:
        if error.code != "PERMISSION_DENIED":
            raise
        return []


def _repair(repair: inference_pb2.Repair) -> str:
    """Return a line about the maps that stand in for skipped layers."""
    line = (
        f"Repair: {stand_in_name(repair.kind)}, {decimal(repair.num_bytes)}, fitted on "
        f"{repair.num_tokens} tokens"
    )
    if repair.HasField("kl_nats") and repair.HasField("kl_nats_without"):
        line += (
            f"; mean KL of the levels {_short(repair.kl_nats, 3)}, "
            f"{_short(repair.kl_nats_without, 3)} without"
        )
    return line


def _table(served: inference_pb2.Model) -> Table:
    names: dict[tuple[int, int], list[str]] = {}
    for level in served.levels:
        name = f"{level.name} *" if level.is_default else level.name
        for limit, letter in _LIMITS.items():
            if level.HasField(limit):
                name += f" ≤{_short(100 * getattr(level, limit), 0)}%{letter}"
        names.setdefault(_depths(level), []).append(name)
    table = Table(caption_justify="left")
    table.add_column("Depth", justify="right", no_wrap=True)
    # The others have 52 characters at most, so that 80 columns leave room for it, if in lines.
    table.add_column("Level", overflow="fold")
    for heading in ("Perplexity", "Agree", "KL", "Tok/s", "Speedup"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {_depths(row): row for row in [*served.depths, *served.levels]}
    for depths in sorted(rows, key=lambda pair: (pair[1], pair[0]), reverse=True):
        prefill, decode = depths
        table.add_row(
            str(decode) if prefill == decode else f"{prefill}/{decode}",
            escape(", ".join(names.get(depths, []))),
            *_measurements(rows[depths]),
        )
    table.caption = (
        "* for requests that name no depth; Agree: next tokens that are the dense model's; KL: "
        "divergence from it, in nats"
    )
    if any(level.HasField("max_quality_loss") for level in served.levels):
        table.caption += "; ≤10%: the shallowest depth with at most 10% more perplexity than dense"
    if any(level.HasField("max_writing_loss") for level in served.levels):
        table.caption += "; ≤10%w: that loses at most 10% in writing, repetition included"
    if any(level.HasField("max_choosing_loss") for level in served.levels):
        table.caption += "; ≤10%c: that finds at most 10% fewer true continuations"
    if any(prefill != decode for prefill, decode in rows):
        table.caption += "; 8/16: 8 layers for the prompt, 16 for what is generated"
    return table


def _depths(level: common_pb2.Level) -> tuple[int, int]:
    return level.prefill_layers, level.decode_layers


def _measurements(level: common_pb2.Level) -> list[str]:
    quality, speed = level.quality, level.speed
    cells = ["-"] * 5
    if level.HasField("quality"):
        cells[:3] = [
            f"{_short(quality.perplexity)} ± {_short(quality.perplexity_stderr)}",
            f"{quality.agreement:.1%}" if quality.HasField("agreement") else "-",
            _short(quality.kl_nats, 3) if quality.HasField("kl_nats") else "-",
        ]
    if level.HasField("speed"):
        cells[3:] = [
            _short(speed.tokens_per_second, 0),
            f"{_short(speed.speedup)}x" if speed.HasField("speedup") else "-",
        ]
    return cells
