"""Sections with a meter in place of the engine's, whose numbers are known and counted.

So a report's time is spent in the middle, whatever the machine, and another run goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from pruning.metrics import DensePass, dense_pass
from pruning.quality import Quality
from pruning.repair import RepairError
from server.config import load_settings
from server.engine.base import LayerSelection, ProgressCallback
from server.evaluation.multiple_choice import Question
from server.report.blocks import Table, with_error
from server.report.budget import Budget, BudgetSpent
from server.report.engine_meter import Pace
from server.report.lab import Lab
from server.report.options import ReportOptions
from server.report.report import NOT_ASKED, NOT_REACHED, OUT_OF_TIME, Report
from server.report.sections import quantization
from server.telemetry.progress import ProgressReport
from tests.server.rpc.toy_engine import ToyEngine, logprob, toy_sums

NUM_LAYERS = 16
SECTIONS = ("importance", "single-removal")


class CountedMeter:
    """Gives numbers that depend on the layers, and remembers what it measured."""

    measured: list[LayerSelection]
    paced: list[LayerSelection]

    def __init__(self, settings: Any, subject: Any) -> None:
        self.engine = UnrepairedEngine()

    async def start(self) -> None:
        await self.engine.start()

    async def close(self) -> None:
        await self.engine.shutdown()

    async def dense_pass(
        self, windows: Sequence[Sequence[int]], progress: ProgressCallback
    ) -> DensePass:
        scores = [(layer + 1) / 100 for layer in range(NUM_LAYERS)]
        return dense_pass([toy_sums(scores, sum(map(len, windows)))])

    async def qualities(
        self,
        windows: Sequence[Sequence[int]],
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Quality]:
        self.measured.extend(selections)
        losses = [sum(layers.decode_skips) + len(layers.decode_skips) for layers in selections]
        return [Quality(10.0 + loss, 0.1, 0.5, loss / 10, 100, 0.01) for loss in losses]

    async def paces(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        selections: Sequence[LayerSelection],
        progress: ProgressCallback,
    ) -> list[Pace]:
        self.paced.extend(selections)
        return [
            Pace(
                (NUM_LAYERS - len(layers.prefill_skips)) / 100,
                1000 / (NUM_LAYERS - len(layers.decode_skips)),
                len(prompts[0]),
                len(prompts),
            )
            for layers in selections
        ]


class UnrepairedEngine(ToyEngine):
    """A toy with which no repair can be fitted."""

    async def fit_repair(self, *args: Any, **options: Any) -> None:
        raise RepairError("too little text")


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
    CountedMeter.measured, CountedMeter.paced = [], []
    with patch("server.report.meters.EngineMeter", CountedMeter):
        yield CountedMeter


async def report(
    out: Path, budget: Budget, sections: Sequence[str] = SECTIONS, **options: Any
) -> dict[str, Any]:
    settings = load_settings(
        {"calibration_tokens": "256", "quality_tokens": "128", "state_dir": str(out.parent)}
    )
    with ProgressReport(Console(stderr=True)) as progress:
        made = Report(settings, ReportOptions(out, sections=sections, **options), progress)
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
    sections = await report(tmp_path / "out", CountedBudget(0), ["importance"])
    assert sections["importance"]["status"] == "done"
    assert sections["single-removal"]["status"] == "done"


async def test_a_page_of_a_run_that_goes_on_says_what_was_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[dict[str, str]] = []
    save = Report._save

    def saved(self: Report) -> Path:
        page = save(self)
        document = json.loads((page.parent / "report.json").read_text("utf-8"))
        reasons.append({each["name"]: each["reason"] for each in document["sections"]})
        return page

    monkeypatch.setattr(Report, "_save", saved)
    await report(tmp_path / "out", CountedBudget(100))
    first, last = reasons[0], reasons[-1]
    assert first["importance"] == ""
    assert first["single-removal"] == NOT_REACHED
    assert last["single-removal"] == ""
    assert first["depth"] == last["depth"] == NOT_ASKED


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (0.0006, "0.0191 ± 0.0006"),
        (0.00004, "0.01910 ± 0.00004"),
        (1e-9, "0.0191000 ± 0.0000000"),
        (0.0, "0.0191 ± 0.0000"),
        (0.3, "0.0191 ± 0.3000"),
        (None, "0.0191"),
    ],
)
def test_a_standard_error_is_shown_with_a_digit_that_tells_something(
    stderr: float | None, expected: str
) -> None:
    assert with_error(0.0191, stderr) == expected


def test_columns_of_words_are_read_from_the_left() -> None:
    rows = [("-", "dense", "26.5 ± 3.1", "10, 5"), ("Block Influence", "12", "-", "8")]
    assert Table(("a", "b", "c", "d"), rows).are_words == [True, True, False, False]
    assert Table(("a", "b"), []).are_words == [False, False]


async def test_the_surface_has_every_pair_of_depths(
    tmp_path: Path, meter: type[CountedMeter]
) -> None:
    sections = await report(tmp_path / "out", CountedBudget(100), ["surface"])
    surface = sections["surface"]
    assert surface["status"] == "done"
    numbers = surface["numbers"]
    assert numbers["order"] == "Block Influence"  # the best that can be had without repair
    depths = numbers["depths"]
    assert depths == [16, 14, 13, 11, 8]
    cells = {(cell["prefill"], cell["decode"]): cell for cell in numbers["cells"]}
    assert set(cells) == {(prefill, decode) for prefill in depths for decode in depths}
    for (prefill, decode), cell in cells.items():
        # The order is that of the scores, so depth d skips the first layers.
        skipped = range(NUM_LAYERS - decode)
        loss = sum(skipped) + len(skipped)
        assert cell["perplexity"] == pytest.approx(10.0 + loss)
        assert cell["of_dense"] == pytest.approx(1 + loss / 10)
        assert cell["first_token_seconds"] == pytest.approx(prefill / 100)
        assert cell["tokens_per_second"] == pytest.approx(1000 / decode)
    plots = {path.stem for path in (tmp_path / "out" / "plots").glob("surface-*.svg")}
    assert plots == {"surface-of-dense", "surface-first-token-seconds", "surface-tokens-per-second"}
    await report(tmp_path / "out", CountedBudget(0), ["surface"])
    assert len(meter.paced) == len(set(meter.paced)) == len(cells)


class CountedQuantizer:
    """Makes no checkpoints, and counts them."""

    made: list[str]

    def __init__(self, lab: Lab) -> None:
        self._directory = lab.directory.measurements

    async def whole(self) -> Path:
        return self._made("whole")

    async def pruned_first(self, depth: int, ranking: Any, scores: Any) -> Path:
        return self._made(f"of {depth}")

    def _made(self, name: str) -> Path:
        self.made.append(name)
        return self._directory / name


class LossyMeter:
    """Loses 1 for each layer and 3 for bits, but 1 where layers were left out before that."""

    def quality(
        self, windows: Any, skipped: Sequence[int], quantized: Any = None, *, of_depth: bool = False
    ) -> Quality:
        loss = len(skipped) + (0 if quantized is None else 1 if of_depth else 3)
        return Quality(10.0 + loss, 0.1, 0.5, 0.1, 100)


@pytest.mark.parametrize("problem", ["", "the processor lacks the instructions"])
async def test_quantization_has_both_orders_and_the_speed_of_both(
    tmp_path: Path,
    meter: type[CountedMeter],
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
) -> None:
    async def transformers(lab: Lab) -> LossyMeter:
        return LossyMeter()

    CountedQuantizer.made = []
    monkeypatch.setattr(Lab, "transformers", transformers)
    monkeypatch.setattr(quantization, "Quantizer", CountedQuantizer)
    monkeypatch.setattr(quantization, "packed_weights_problem", lambda: problem)
    monkeypatch.setattr(quantization, "check_quantized_kernels", lambda bits, dtype: None)
    section = (await report(tmp_path / "out", CountedBudget(100), ["quantization"]))["quantization"]
    assert section["status"] == "done"
    depths = [16, 14, 13, 12]
    rows = section["numbers"]["rows"]
    assert [row["depth"] for row in rows] == depths
    for row in rows:
        loss = NUM_LAYERS - row["depth"]
        assert row["unquantized"]["perplexity"] == 10 + loss
        assert row["quantized"]["perplexity"] == 10 + loss + 3
        if loss:
            assert row["pruned_first"]["perplexity"] == 10 + loss + 1
        speeds = row.get("tokens_per_second"), row.get("quantized_tokens_per_second")
        assert speeds == ((None, None) if problem else (1000 / row["depth"],) * 2)
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert (f"No throughput of quantized weights here: {problem}." in page) == bool(problem)
    plots = {path.stem for path in (tmp_path / "out" / "plots").glob("quantization*.svg")}
    assert plots == {"quantization"} | (set() if problem else {"quantization-speed"})
    # The engine of the model, and that of the quantized checkpoint.
    assert len(meter.paced) == (0 if problem else 2 * len(depths))
    await report(tmp_path / "out", CountedBudget(0), ["quantization"])
    assert CountedQuantizer.made == ["whole", *(f"of {depth}" for depth in depths[1:])]


async def test_tasks_are_asked_at_each_level(tmp_path: Path) -> None:
    questions = [Question(f"Which of {n}?", ("one", "another"), n % 2) for n in range(12)]
    sections = await report(
        tmp_path / "out", CountedBudget(1000), ["tasks"], questions={"which": questions}
    )
    tasks = sections["tasks"]
    assert tasks["status"] == "done"
    dense, *others = tasks["numbers"]["rows"]
    assert dense["name"] == "dense"
    assert dense["retention"] == 1.0
    # Without n layers the perplexity is 10 + 1 + ... + n. What may be lost is 10, 25 and 100 %,
    # and one standard error of the ratio has to fit in as well: for 10 % no depth is good enough.
    named = [row for row in others if row["name"].startswith("level")]
    assert [(row["name"], row["prefill_layers"], row["decode_layers"]) for row in named] == [
        ("level fast", 15, 15),
        ("level turbo", 13, 13),
        ("level prompt", 1, 16),
    ]
    for row in [dense, *others]:
        layers = LayerSelection(
            tuple(range(NUM_LAYERS - row["prefill_layers"])),
            tuple(range(NUM_LAYERS - row["decode_layers"])),
        )
        assert row["accuracy"]["which"]["share"] == pytest.approx(share(questions, layers))
        assert row["retention"] == pytest.approx(row["mean"] / dense["mean"])
    [missing] = tasks["numbers"]["missing"]
    assert missing["order"] == "greedy removal + repair"
    assert "too little text" in missing["why"]
    assert "too little text" in (tmp_path / "out" / "index.html").read_text("utf-8")


def share(questions: Sequence[Question], layers: LayerSelection) -> float:
    def likelihood(question: Question, choice: str) -> float:
        ids, total = [256, *f"{question.text}\nAnswer:".encode()], 0.0
        for token in f" {choice}".encode():
            total += logprob(ids, token, layers)
            ids.append(token)
        return total / len(choice)

    right = 0
    for question in questions:
        best = max(question.choices, key=lambda choice: likelihood(question, choice))
        right += best == question.choices[question.right]
    return right / len(questions)
