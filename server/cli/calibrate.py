"""``fathom calibrate``."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pruning.metrics.names import METRIC_NAMES
from pruning.text import TextError, load_texts
from server.cli.connection import Connection, connected, with_connection
from server.cli.problems import report_problem
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2
from server.telemetry.progress import ProgressReport

# So that the table of a plan by greedy_kl fits 80 columns.
_LONGEST_HEADING = 9


@with_connection
def calibrate(
    connection: Connection,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to rank the layers on, read by this command: a file, a directory or a "
            "Hugging Face dataset; none: the text that the server was started with."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to rank the layers on.", min=0, max=2**32 - 1),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What to rank the layers by, such as greedy_kl; none: the server's setting."
        ),
    ] = None,
    max_characters: Annotated[
        int, typer.Option(help="Characters of --text to send at most.", min=1)
    ] = 2_000_000,
) -> None:
    """Rank the layers anew while the server goes on serving, and print the plan."""
    try:
        texts = [] if text is None else load_texts(text, max_characters=max_characters)
    except TextError as error:
        report_problem(f"--text: {error}")
        sys.exit(2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    request = control_pb2.CalibrateRequest(texts=texts, max_tokens=max_tokens, metric=metric)
    with connected(connection) as client, ProgressReport(Console(stderr=True)) as report:
        plan = None
        for response in client.calibrate(request):
            match response.WhichOneof("event"):
                case "progress":
                    progress = response.progress
                    report.advance(progress.phase, progress.done, progress.total)
                case "plan":
                    plan = response.plan
    assert plan is not None, "the stream ends with the plan"
    console = Console(highlight=False)
    console.print(_table(plan))
    order = ", ".join(map(str, plan.removal_order))
    console.print(plan_line(plan))
    console.print(f"Removal order: {order}", soft_wrap=True)


def plan_line(plan: common_pb2.Plan) -> str:
    """Return a line that says what the layers are ranked by, on how much text, and how surely."""
    line = f"Ranked by {plan.metric}, on {plan.num_tokens} tokens"
    if not plan.HasField("settled"):
        return line
    if plan.settled:
        return f"{line}: other text of the kind would leave out the same layers at the levels"
    return f"{line}: too few to be sure of the layers that the levels leave out"


def _table(plan: common_pb2.Plan) -> Table:
    removed = {layer: position for position, layer in enumerate(plan.removal_order, start=1)}
    table = Table(
        title=f"Block influence on {plan.num_tokens} tokens",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    others = [name for name in METRIC_NAMES if name in plan.other_scores]
    for heading in ("Layer", "Influence", *others, "Removed"):
        # A long one can be broken at spaces.
        is_long = len(heading) > _LONGEST_HEADING
        table.add_column(
            heading.replace("_", " ") if is_long else heading, justify="right", no_wrap=not is_long
        )
    for layer in plan.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.score:.4f} ± {layer.stderr:.4f}",
            *(f"{plan.other_scores[name].scores[layer.layer]:.4g}" for name in others),
            str(removed[layer.layer]),
        )
    return table
