"""The document that every benchmark writes, and the table that it prints."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.machine import describe_machine, describe_versions
from bench.statistics import Spread
from pruning.durable import replace_file

FORMAT_VERSION = 1


class Target(BaseModel):
    """A target: a bound on a measured value."""

    model_config = ConfigDict(extra="forbid")

    name: str
    # ">=" or "<="
    relation: str = Field(pattern="^[<>]=$")
    bound: float
    # Median and range over the rounds; a single value has no range.
    value: float
    low: float
    high: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.relation == ">=" else self.value <= self.bound

    @classmethod
    def of(cls, name: str, spread: Spread, relation: str, bound: float, unit: str = "") -> Target:
        return cls(
            name=name,
            relation=relation,
            bound=bound,
            value=spread.median,
            low=spread.low,
            high=spread.high,
            unit=unit,
        )


class Report(BaseModel):
    """One run of one benchmark. Times are in seconds unless a name says otherwise."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    benchmark: str
    created_at: float
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    model: dict[str, Any]
    options: dict[str, Any]
    # One entry for each measurement, in order.
    rounds: list[dict[str, Any]]
    # The summary of the rounds.
    summary: list[dict[str, Any]]
    targets: list[Target] = []
    notes: list[str] = []

    @classmethod
    def begin(cls, benchmark: str, model: dict[str, Any], options: dict[str, Any]) -> Report:
        program = Path(sys.argv[0]).name
        return cls(
            benchmark=benchmark,
            created_at=time.time(),
            command=shlex.join([program, *sys.argv[1:]]),
            machine=describe_machine(),
            versions=describe_versions(),
            model=model,
            options=options,
            rounds=[],
            summary=[],
        )

    def save(self, directory: Path) -> Path:
        """Write the document into ``directory``, and return its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.benchmark}.json"
        replace_file(path, (self.model_dump_json(indent=2) + "\n").encode())
        return path

    def print(self, console: Console) -> None:
        """Print the summary and the targets."""
        machine = self.machine
        processors = ", ".join(
            [*machine["gpus"], f"{machine['num_cpus']} x {machine['processor']}"]
        )
        model = ", ".join(f"{name} {value}" for name, value in self.model.items())
        console.print(escape(f"{processors}; {model}"), soft_wrap=True)
        for columns, title in ((_speed_headings, self.benchmark), (_latency_headings, "latency")):
            if headings := columns(self.summary):
                console.print(_table(self.summary, headings, title))
        if self.targets:
            console.print(_targets_table(self.targets))
        for note in self.notes:
            console.print(escape(note), soft_wrap=True)


def _is_latency(heading: str) -> bool:
    return heading.startswith(("ttft_", "itl_"))


def _headings(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))


def _speed_headings(rows: list[dict[str, Any]]) -> list[str]:
    return [heading for heading in _headings(rows) if not _is_latency(heading)]


def _latency_headings(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns of latencies, after the given ones that label a row."""
    headings = _headings(rows)
    keys = [
        heading
        for heading in headings
        if all(isinstance(row.get(heading), str | int) for row in rows)
    ]
    latencies = [heading for heading in headings if _is_latency(heading)]
    return [*keys, *latencies] if latencies else []


def _table(rows: list[dict[str, Any]], headings: list[str], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        is_text = all(isinstance(row.get(heading), str | None) for row in rows)
        label = heading.replace("_", " ")
        label = label.capitalize() if label.islower() else label
        label = label.replace("Kl ", "KL ")
        table.add_column(label, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*[_cell(row.get(heading)) for heading in headings])
    return table


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.{3 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
        case _:
            return escape(str(value))


def _targets_table(targets: list[Target]) -> Table:
    table = Table(title="targets", title_justify="left")
    for heading in ("Target", "Bound", "Measured", "Range", "Holds"):
        table.add_column(heading, justify="left" if heading == "Target" else "right")
    for target in targets:
        unit = f" {target.unit}" if target.unit else ""
        table.add_row(
            escape(target.name),
            f"{target.relation} {target.bound:g}{unit}",
            f"{target.value:.3f}{unit}",
            f"{target.low:.3f} to {target.high:.3f}",
            "yes" if target.holds else "[bold]no[/bold]",
        )
    return table
