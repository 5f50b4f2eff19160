"""A report whose time is spent in the middle, and the run that goes on from there.

The measurements are counted, not timed, and come from a meter in place of the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from pruning.importance import BlockInfluence
from pruning.quality import Quality
from server.config import load_settings
from server.engine.base import LayerSelection, ProgressCallback
from server.report.budget import Budget, BudgetSpent
from server.report.options import ReportOptions
from server.report.report import OUT_OF_TIME, Report
from server.telemetry.progress import ProgressReport

NUM_LAYERS = 16
SECTIONS = ("importance", "single-removal")


class CountedMeter:
    """Gives numbers that depend on the layers, and remembers what it measured."""

    measured: list[LayerSelection]

    def __init__(self, settings: Any, subject: Any) -> None:
        pass

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def importance(
        self, windows: Sequence[Sequence[int]], progress: ProgressCallback
    ) -> BlockInfluence:
        scores = tuple((layer + 1) / 100 for layer in range(NUM_LAYERS))
        return BlockInfluence(scores, (0.001,) * NUM_LAYERS, sum(map(len, windows)))

    async def qualities(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        self.measured.extend(selections)
        losses = [sum(layers.decode_skips) + len(layers.decode_skips) for layers in selections]
        return [Quality(10.0 + loss, 0.1, 0.5, loss / 10, 100, 0.01) for loss in losses]


class CountedBudget(Budget):
    """Is spent after so many measurements."""

    def __init__(self, num_measurements: int) -> None:
        super().__init__()
        self._num_left = num_measurements

    def check(self) -> None:
        if self._num_left == 0:
            raise BudgetSpent
        self._num_left -= 1


@pytest.fixture(autouse=True)
def meter() -> Iterator[type[CountedMeter]]:
    CountedMeter.measured = []
    with patch("server.report.lab.EngineMeter", CountedMeter):
        yield CountedMeter


async def report(out: Path, budget: Budget) -> dict[str, Any]:
    settings = load_settings(
        {"calibration_tokens": "256", "quality_tokens": "128", "state_dir": str(out.parent)}
    )
    with ProgressReport(Console(stderr=True)) as progress:
        made = Report(settings, ReportOptions(out, sections=SECTIONS), progress)
        made.lab.budget = budget
        page = await made.run()
    assert page == out / "index.html"
    document = json.loads((out / "report.json").read_text("utf-8"))
    return {section["name"]: section for section in document["sections"]}


async def test_what_was_measured_is_shown_and_is_not_measured_again(
    tmp_path: Path, meter: type[CountedMeter]
) -> None:
    out = tmp_path / "out"
    sections = await report(out, CountedBudget(2))
    assert sections["importance"]["status"] == "done"
    first = sections["single-removal"]
    assert (first["status"], first["reason"]) == ("partial", OUT_OF_TIME)
    rows = first["numbers"]["layers"]
    assert 0 < len(rows) < NUM_LAYERS
    assert len(meter.measured) == len(rows) + 1  # the dense model
    assert sections["depth"]["status"] == "skipped"
    page = (out / "index.html").read_text("utf-8")
    assert f"Incomplete: {OUT_OF_TIME}" in page
    assert "What is not here" in page

    sections = await report(out, CountedBudget(100))
    second = sections["single-removal"]
    assert second["status"] == "done"
    assert second["numbers"]["layers"][: len(rows)] == rows
    assert len(second["numbers"]["layers"]) == NUM_LAYERS
    assert len(meter.measured) == len(set(meter.measured)) == NUM_LAYERS + 1
    assert second["numbers"]["spearman_kl_nats"] == pytest.approx(1.0)
    assert OUT_OF_TIME not in (out / "index.html").read_text("utf-8")
    assert second["seconds"] >= first["seconds"]


async def test_sections_of_an_earlier_run_stay(tmp_path: Path) -> None:
    await report(tmp_path / "out", CountedBudget(100))
    with patch(f"{__name__}.SECTIONS", ("importance",)):
        sections = await report(tmp_path / "out", CountedBudget(0))
    assert sections["importance"]["status"] == "done"
    assert sections["single-removal"]["status"] == "done"
