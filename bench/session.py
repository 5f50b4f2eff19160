"""One run of a benchmark: measures in turns, keeps every round, prints, saves and plots."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console

from bench.load import Load, closed_loop
from bench.machine import ForeignLoad, cpu_seconds, processes_of
from bench.options import Options
from bench.report import Report
from bench.statistics import Percentiles
from bench.subjects.base import Subject
from bench.subjects.transformers_generate import TransformersGenerate
from bench.workload import Request
from server.report.matplotlib_check import check_matplotlib
from server.telemetry.progress import ProgressReport

T = TypeVar("T")

# How often a load is run at most, if other programs disturb it.
_MAX_ATTEMPTS = 4
# CPU time is counted in hundredths of a second, so its share of a shorter time says nothing.
_MIN_SECONDS_FOR_SHARES = 1.0
# The width of tables that are written to a file.
_FILE_COLUMNS = 180


class Session:
    """One benchmark from its beginning to its files."""

    def __init__(self, benchmark: str, options: Options, model: dict[str, Any]) -> None:
        check_matplotlib()
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = _FILE_COLUMNS
        self.report = Report.begin(benchmark, model, options.to_json())
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.directory = Path(options.output or f"bench-results/{benchmark}-{stamp}")
        self._max_disturbance = options.max_disturbance
        self.progress = ProgressReport(Console(stderr=True))

    @property
    def title(self) -> str:
        """What plots are headed with: the model."""
        return str(self.report.model["name"])

    async def measure(
        self,
        work: Callable[[], Awaitable[Load]],
        processes: Callable[[], Sequence[psutil.Process]] = list,
        /,
        repeatable: bool = True,
        **labels: Any,
    ) -> Load:
        """Run a load and keep its result as a round with these labels.

        ``processes`` are those of what is measured. The round records their CPU time, the CPU time
        of engines that wait for their turn, and the share of the machine that other programs
        used. If other programs used too much, the load is run again, and the least disturbed run
        counts.
        """
        load, values = await self.least_disturbed(
            lambda: self._measure_once(work, list(processes())),
            _MAX_ATTEMPTS if repeatable else 1,
        )
        self.add_round({**labels, **values})
        return load

    def add_round(self, values: dict[str, Any]) -> None:
        """Keep what was measured, also on disk: so a run that is cut off loses none of it."""
        self.report.rounds.append(values)
        self.save()

    def save(self) -> Path:
        """Write what was measured so far, and return the path of the file."""
        return self.report.save(self.directory)

    async def least_disturbed(
        self, once: Callable[[], Awaitable[tuple[T, dict[str, Any]]]], attempts: int = _MAX_ATTEMPTS
    ) -> tuple[T, dict[str, Any]]:
        """Return the least disturbed result of ``once``, which is repeated if others disturb it.

        Results must have a ``foreign_load``; the number of ``attempts`` is added to them.
        """
        best = await once()
        attempt = 1
        while best[1]["foreign_load"] > self._max_disturbance and attempt < attempts:
            again = await once()
            best = min(best, again, key=lambda result: float(result[1]["foreign_load"]))
            attempt += 1
        best[1]["attempts"] = attempt
        return best

    async def _measure_once(
        self, work: Callable[[], Awaitable[Load]], own: Sequence[psutil.Process]
    ) -> tuple[Load, dict[str, Any]]:
        here = psutil.Process()
        ids = {process.pid for process in (here, *own)}
        waiting = [process for process in processes_of(here) if process.pid not in ids]
        groups = (own, [here], waiting)
        foreign = ForeignLoad()
        before = [cpu_seconds(group) for group in groups]
        load = await work()
        used = [cpu_seconds(group) - then for group, then in zip(groups, before, strict=True)]
        return load, {
            "num_tokens": load.num_tokens,
            "seconds": load.seconds,
            "tokens_per_second": load.tokens_per_second,
            "time_to_first_token": _as_dict(load.time_to_first_token()),
            "inter_token_latency": _as_dict(load.inter_token_latency()),
            "cpu_seconds": used[0],
            "client_cpu_seconds": used[1],
            "waiting_cpu_seconds": used[2],
            "foreign_load": foreign.share(),
        }

    async def closed_loop(
        self,
        subject: Subject | TransformersGenerate,
        streams: Sequence[Sequence[Request]],
        /,
        **labels: Any,
    ) -> Load:
        if isinstance(subject, TransformersGenerate):
            return await self.measure(lambda: subject.closed_loop(streams), **labels)
        return await self.measure(
            lambda: closed_loop(subject.generate, streams), subject.processes, **labels
        )

    def values(self, quantity: str, **labels: Any) -> list[float]:
        """Return a quantity of the rounds with these labels, in order; ``a.b`` is item b of a."""
        result = []
        for each in self.report.rounds:
            if all(each.get(name) == value for name, value in labels.items()):
                value: Any = each
                for name in quantity.split("."):
                    value = None if value is None else value[name]
                if value is not None:
                    result.append(value)
        return result

    def finish(self, plot: Callable[[Path], object]) -> None:
        """Print, save and plot."""
        busiest = max((each.get("foreign_load", 0.0) for each in self.report.rounds), default=0.0)
        if busiest > 0.05:
            self.report.notes.append(
                f"Other programs took up to {busiest:.0%} of the machine during a round: "
                "the figures may be off."
            )
        waited = max(
            (
                each["waiting_cpu_seconds"] / each["seconds"]
                for each in self.report.rounds
                if "waiting_cpu_seconds" in each and each["seconds"] >= _MIN_SECONDS_FOR_SHARES
            ),
            default=0.0,
        )
        if waited > 0.02:
            self.report.notes.append(
                f"Engines that only waited for their turn used up to {waited:.0%} of a core."
            )
        self.report.print(self.console)
        path = self.save()
        plot(self.directory / self.report.benchmark)
        self.console.print(f"Written to {path.parent}", soft_wrap=True)


def _as_dict(percentiles: Percentiles | None) -> Mapping[str, float] | None:
    return None if percentiles is None else asdict(percentiles)
