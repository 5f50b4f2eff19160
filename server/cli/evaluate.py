"""``fathom eval``."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.cli.connection import Connection, connected, with_connection
from server.errors import InvalidArgument
from server.rpc.generated.fathom.v1 import common_pb2

if TYPE_CHECKING:
    from server.evaluation.evaluation import TaskResult


@with_connection
def evaluate(
    connection: Connection,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas: arc_easy, boolq, copa, mmlu, piqa, winogrande, or "
            "paths of YAML files."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Directory with the files of the tasks.")],
    level: Annotated[str | None, typer.Option(help="Level of the server to run at.")] = None,
    depth: Annotated[int | None, typer.Option(help="Layers that run.", min=1)] = None,
    num_fewshot: Annotated[
        int, typer.Option(help="Examples with answers before each question.", min=0)
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task at most.", min=1)
    ] = None,
    retention: Annotated[
        bool,
        typer.Option(help="Whether the dense model is evaluated, too, to say what is left of it."),
    ] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Evaluate a live server by lm-evaluation-harness, which the extra eval installs."""
    if importlib.util.find_spec("lm_eval") is None:
        raise typer.BadParameter("the extra eval is needed: pip install 'fathom-server[eval]'")
    if level is not None and depth is not None:
        raise typer.BadParameter("--level and --depth exclude each other")
    from server.evaluation.evaluation import evaluate as evaluated
    from server.evaluation.evaluation import report
    from server.evaluation.harness_model import ServerModel
    from server.evaluation.local_tasks import local_tasks

    try:
        chosen = local_tasks([name.strip() for name in tasks.split(",") if name.strip()], data)
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from None
    with connected(connection) as client:
        model = client.get_model()
        lm = ServerModel(client, common_pb2.Depth(level=level, layers=depth))
        results = evaluated(lm, chosen, num_fewshot=num_fewshot, limit=limit)
        assert lm.served is not None
        served = f"{lm.served.prefill_layers}/{lm.served.decode_layers}"
        dense = None
        if retention and served != f"{model.num_layers}/{model.num_layers}":
            whole = ServerModel(client, common_pb2.Depth(layers=model.num_layers))
            dense = evaluated(whole, chosen, num_fewshot=num_fewshot, limit=limit)
    if output is not None:
        found = report(model.name, served, results, dense)
        output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    Console().print(_table(served, results, dense))


def _table(
    served: str, results: dict[str, TaskResult], dense: dict[str, TaskResult] | None
) -> Table:
    table = Table("Task", "Items", f"acc at {served}", "acc_norm", "dense acc", "dense acc_norm")
    for name, result in results.items():
        cells = _cells(None if dense is None else dense[name])
        table.add_row(name, str(result.num_items), *_cells(result), *cells)
    return table


def _cells(result: TaskResult | None) -> list[str]:
    if result is None:
        return ["-", "-"]
    return [
        _with_error(result.acc, result.acc_stderr),
        _with_error(result.acc_norm, result.acc_norm_stderr),
    ]


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"
